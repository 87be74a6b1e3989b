"""`client.jobs`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from tuneproof.aio.datasets import READING_SECONDS
from tuneproof.aio.transport import AsyncTransport, at
from tuneproof.errors import JobFailed, TuneproofError, WaitTimeout
from tuneproof.results import Dataset, Event, Flip, Job, JobStatus
from tuneproof.retries import passing
from tuneproof.tables import Source, TableOptions, form_fields, opened, read_predictions

if TYPE_CHECKING:
    import pandas as pd

_DATASET_ID = re.compile(r"ds_[0-9a-z]+")
# Of one long poll. It answers on a change of status or stage alone, so progress is as old as this at most.
_POLL_SECONDS = 30.0


@contextmanager
def _in_time(job_id: str, timeout_seconds: float | None) -> Iterator[None]:
    """Of what may still go away, but not in the time given, makes a WaitTimeout."""
    try:
        yield
    except TuneproofError as error:
        if timeout_seconds is None or not passing(error):
            raise
        detail = f"The job {job_id} has not ended after {timeout_seconds:g} s, as far as can be seen. {error}"
        raise WaitTimeout(None, "wait_timeout", detail) from error


class AsyncJobs:
    """Experiments: from a file to a verdict and a model."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def submit(
        self,
        source: Source | Dataset,
        spec: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[TableOptions],
    ) -> Job:
        """Start a job, with one call that uploads the file too.

        Args:
            source: A path, an open binary file, a pandas DataFrame, or a dataset that is there already, or its id.
            spec: The job's spec; empty means an experiment with every default.
            idempotency_key: Yours, so that a script which runs again within a day gets the same job.
            options: About a file or a frame, see `TableOptions`; of a dataset that is there already, `name` alone.
        """
        creates = idempotency_key or True
        if isinstance(source, Dataset) or (isinstance(source, str) and _DATASET_ID.fullmatch(source)):
            if others := sorted(options.keys() - {"name"}):
                raise ValueError(f"{', '.join(others)} describe a file; this dataset has been read already.")
            dataset_id = source.id if isinstance(source, Dataset) else source
            body = {**(spec or {}), **({"name": options["name"]} if options.get("name") else {})}
            response = await self._transport.send(
                "POST", "/jobs", creates=creates, json={**body, "dataset_id": dataset_id}
            )
        else:
            with opened(source) as (file, known):
                form = {"spec": json.dumps(dict(spec or {})), **form_fields(options, known)}
                response = await self._transport.send(
                    "POST", "/jobs", creates=creates, wait_seconds=READING_SECONDS, data=form, files={"file": file}
                )
        return self._transport.parsed(Job, response)

    async def predict(
        self,
        model: str,
        source: Source | Dataset,
        *,
        top_k: int | None = None,
        min_confidence: float = 0.0,
        idempotency_key: str | None = None,
        **options: Unpack[TableOptions],
    ) -> Job:
        """Start a job that labels every text of a file, for more of them than `client.predict` takes.

        Args:
            model: Its id, or an alias; the one it points to now does all of it.
            source: As for `submit`; no column of labels is needed.
            top_k: How many labels to write with their probabilities, besides the answer.
            min_confidence: Below it the label is left open.
            idempotency_key: As for `submit`.
            options: As for `submit`.
        """
        spec: dict[str, Any] = {"kind": "predict", "model": model, "min_confidence": min_confidence}
        if top_k is not None:
            spec["top_k"] = top_k
        return await self.submit(source, spec, idempotency_key=idempotency_key, **options)

    async def get(self, job_id: str) -> Job:
        return await self._transport.get(Job, at("jobs", job_id))

    def list(
        self,
        *,
        status: JobStatus | None = None,
        kind: str | None = None,
        dataset_id: str | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Job]:
        """Every job, or the first `limit`, newest first."""
        asked = {"status": status, "kind": kind, "dataset_id": dataset_id}
        return self._transport.pages(Job, "/jobs", limit, asked)

    async def watch(self, job_id: str, *, every_seconds: float = 1.0) -> AsyncIterator[Job]:
        """The job now, at each change of status or stage, and at least `every_seconds`; the last one has ended."""
        job = await self.get(job_id)
        yield job
        while not job.terminal:
            job = await self._poll(job_id, every_seconds)
            yield job

    async def wait(
        self,
        job_id: str,
        on_progress: Callable[[Job], object] | None = None,
        *,
        timeout_seconds: float | None = None,
        raise_on_failure: bool = True,
    ) -> Job:
        """The job when it has ended.

        Args:
            job_id: Of the job.
            on_progress: Called with the job now, at each change, and at least every second.
            timeout_seconds: How long to wait, and how long a server that is away is asked again; None is as long as
                it takes. An answer that is under way is waited for.
            raise_on_failure: Whether a job that failed or was cancelled is an error.

        Raises:
            JobFailed: it failed or was cancelled.
            WaitTimeout: it was not done in time; it goes on.
        """
        end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        longest = _POLL_SECONDS if on_progress is None else 1.0
        with _in_time(job_id, timeout_seconds):
            job = await self._transport.get(Job, at("jobs", job_id), retry_seconds=timeout_seconds)
        while True:
            if on_progress is not None:
                on_progress(job)
            if job.terminal:
                break
            left = longest if end is None else end - time.monotonic()
            if left <= 0:
                detail = f"The job {job_id} is {job.status} after {timeout_seconds:g} s; it goes on."
                raise WaitTimeout(None, "wait_timeout", detail)
            with _in_time(job_id, timeout_seconds):
                job = await self._poll(job_id, min(left, longest), None if end is None else left)
        if raise_on_failure and job.status != "succeeded":
            raise JobFailed(job)
        return job

    def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """What has happened so far, oldest first; `after` is the last id seen."""
        return self._transport.pages(Event, at("jobs", job_id, "events"), None, {"after": after})

    def stream(self, job_id: str) -> AsyncIterator[Event]:
        """What has happened and what happens, with progress, until the job has ended.

        A connection that breaks, or a server that restarts, loses none of the kept events.
        """
        return self._transport.events(Event, at("jobs", job_id, "events"))

    async def cancel(self, job_id: str) -> Job:
        """Ask for the job to be cancelled; refused (409) where it has already ended."""
        return await self._tell(job_id, "cancel")

    async def retry(self, job_id: str) -> Job:
        """Start a failed or cancelled job again, from its last checkpoint."""
        return await self._tell(job_id, "retry")

    async def delete(self, job_id: str) -> None:
        """The job, its events and artifacts; its models stay. Refused (409) while it has not ended."""
        await self._transport.send("DELETE", at("jobs", job_id), done=404)

    async def download(self, job_id: str, name: str, to: str | PathLike[str] | None = None) -> Path:
        """One artifact, such as `metrics.json`, into the file `to`; without one, into a file of its name here."""
        return await self._transport.download(self._artifact(job_id, name), to or Path(name).name)

    async def report(self, job_id: str, to: str | PathLike[str] | None = None) -> Path:
        """The report, one page that needs no network, into the file `to`; without one, `report-<job_id>.html` here."""
        return await self._transport.download(at("jobs", job_id, "report"), to or f"report-{job_id}.html")

    async def metrics(self, job_id: str) -> dict[str, Any]:
        """`metrics.json`: every figure of every method, and the comparisons."""
        response = await self._transport.send("GET", self._artifact(job_id, "metrics.json"))
        return cast(dict[str, Any], self._transport.json(response))

    async def predictions(self, job_id: str) -> pd.DataFrame:
        """`predictions.csv`: the validation and test rows with every answer; all rows of a job that predicts."""
        return read_predictions((await self._transport.send("GET", self._artifact(job_id, "predictions.csv"))).content)

    def flips(
        self, job_id: str, *, candidate: str | None = None, baseline: str | None = None, label: str | None = None
    ) -> AsyncIterator[Flip]:
        """The rows that one side of a comparison has right and the other wrong; `label` is the true one."""
        asked = {"candidate": candidate, "baseline": baseline, "label": label}
        return self._transport.pages(Flip, at("jobs", job_id, "flips"), None, asked)

    async def _tell(self, job_id: str, what: str) -> Job:
        response = await self._transport.send("POST", at("jobs", job_id, what), done=409)
        return self._transport.parsed(Job, response) if response.is_success else await self.get(job_id)

    async def _poll(self, job_id: str, seconds: float, retry_seconds: float | None = None) -> Job:
        path, params = at("jobs", job_id, "wait"), {"timeout_seconds": seconds}
        return await self._transport.get(Job, path, params=params, wait_seconds=seconds, retry_seconds=retry_seconds)

    def _artifact(self, job_id: str, name: str) -> str:
        return at("jobs", job_id, "artifacts", *name.split("/"))
