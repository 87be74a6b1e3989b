"""Labels rows by the number in their text, at no cost: what actors hold where a test is about rows alone."""

from pathlib import Path

from service.ml.dataset import Row
from worker.bulk import Tally


class StubLabeller:
    """As `worker.bulk.Labeller`."""

    def __init__(self, model: Path) -> None:
        assert model.is_dir()

    def label(self, rows: list[Row]) -> tuple[str, Tally]:
        lines = "".join(f"{row.row_id},{int(row.text.rpartition(' ')[2]) % 7}\n" for row in rows)
        return lines, Tally(rows=len(rows))
