# Made by tools/make_sync.py from tuneproof/aio; change it there.
"""`client.datasets`."""

from collections.abc import Iterator
from typing import Any, Unpack

from tuneproof.results import Dataset, Preflight, Row
from tuneproof.sync.transport import Transport, at
from tuneproof.tables import Source, TableOptions, form_fields, opened

# The server reads a whole file before it answers.
READING_SECONDS = 600.0


class Datasets:
    """Files of labelled texts."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(self, source: Source, *, idempotency_key: str | None = None, **options: Unpack[TableOptions]) -> Dataset:
        """Send a file alone; a job can name it later.

        Args:
            source: A path, an open binary file (both streamed), or a pandas DataFrame.
            idempotency_key: Yours, so that a script which runs again within a day gets the same dataset.
            options: See `TableOptions`.
        """
        with opened(source) as (file, known):
            response = self._transport.send(
                "POST", "/datasets", creates=idempotency_key or True, wait_seconds=READING_SECONDS,
                data=form_fields(options, known), files={"file": file},
            )  # fmt: skip
        return self._transport.parsed(Dataset, response)

    def get(self, dataset_id: str) -> Dataset:
        return self._transport.get(Dataset, at("datasets", dataset_id))

    def list(self, *, limit: int | None = None) -> Iterator[Dataset]:
        """Every dataset, or the first `limit`, newest first."""
        return self._transport.pages(Dataset, "/datasets", limit)

    def rows(self, dataset_id: str, *, offset: int = 0, limit: int = 50) -> tuple[Row, ...]:
        """Up to 200 rows as they are read, in the order of the file."""
        response = self._transport.send(
            "GET", at("datasets", dataset_id, "rows"), params={"offset": offset, "limit": limit}
        )
        return tuple(self._transport.page(Row, response)[0])

    def preflight(self, dataset_id: str, **asked: Any) -> Preflight:
        """What a job on the dataset would meet, and about how long it would take, before any compute.

        Args:
            dataset_id: A labelled dataset.
            asked: Values of the job: `base_model`, `max_length`, `seed`, `train`, `validation`, `test`.
        """
        path = at("datasets", dataset_id, "preflight")
        return self._transport.get(Preflight, path, params=asked, wait_seconds=READING_SECONDS)

    def delete(self, dataset_id: str) -> None:
        """Refused (409) while a job on it has not ended; models outlive it."""
        self._transport.send("DELETE", at("datasets", dataset_id), done=404)
