"""Databases with rows in them, and a clock that stands still: what tests of the queue and the API start from."""

import io
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from service.core.clock import Steadiness
from service.core.ids import new_id
from service.core.spec import JobSpec
from service.db import garbage, jobs
from service.db.engine import Database
from service.db.jobs import Claimed, NewArtifact, NewModel
from service.db.models import Dataset, Job
from service.storage import Storage

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
GRACE = timedelta(seconds=60)
LEASE_SECONDS = 30.0


class StillClock:
    """The time, moved by hand."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


class Steady(Steadiness):
    """As of a clock that nobody sets, for tests that move one by hand."""

    def __init__(self) -> None:
        super().__init__(lambda: START, 0)

    def __call__(self) -> bool:
        return True


def add_dataset(
    db: Database, *, labels: tuple[str, ...] = ("a", "b"), storage_key: str = "", now: datetime = START
) -> str:
    """A dataset as an upload would leave it, without its bytes."""
    dataset_id = new_id("ds")
    profile = {
        "format": {
            "text_column": "text", "label_column": "label" if labels else None, "split_column": None, "delimiter": ",",
            "has_header": True, "encoding": "utf-8", "literal_quotes": False, "dropped_labels": [],
            "labelled": bool(labels),
        },
        "inferred": [], "n_rows": 10, "n_usable_rows": 10,
        "labels": [{"label": label, "count": 5} for label in labels],
        "text_length": {"p50_chars": 1, "p95_chars": 1, "max_chars": 1}, "warnings": [],
    }  # fmt: skip
    with db.write() as session:
        session.add(
            Dataset(
                id=dataset_id, name="tickets", created_at=now, sha256="0" * 64, size_bytes=1,
                storage_key=storage_key or f"datasets/{dataset_id}/file", profile=profile,
            )
        )  # fmt: skip
    return dataset_id


def add_job(db: Database, dataset_id: str | None = None, *, name: str = "tickets", now: datetime = START) -> str:
    dataset_id = dataset_id or add_dataset(db)
    spec = JobSpec(name=name).model_dump(exclude={"model", "metadata", "dataset_id", "webhook_url"})
    with db.write() as session:
        job = jobs.submit(
            session, kind="experiment", name=name, dataset_id=dataset_id, spec=spec, metadata={}, now=now
        )  # fmt: skip
        return job.id


def claim(db: Database, now: datetime = START, worker: str = "wrk_1") -> Claimed:
    claimed = jobs.claim(db, worker, now, LEASE_SECONDS)
    assert claimed is not None
    return claimed


def read_job(db: Database, job_id: str) -> Job:
    with db.read() as session:
        return jobs.get(session, job_id)


def artifact(name: str, prefix: str = "jobs/x/1-t", *, holds_texts: bool = False) -> NewArtifact:
    return NewArtifact(name, 3, "1" * 64, f"{prefix}/{name}", holds_texts)


def model(method: str = "lora", **given: Any) -> NewModel:
    model_id = new_id("mdl")
    values: dict[str, Any] = {
        "id": model_id, "method": method, "base_model": "minilm", "base_revision": "sha256:0", "labels": ["a", "b"],
        "metrics": {"accuracy": 0.9, "macro_f1": 0.9}, "size_bytes": 3, "storage_prefix": f"models/{model_id}",
        "files": ["manifest.json"],
    }  # fmt: skip
    return NewModel(**values | given)


def publish_stored(
    db: Database, lease: jobs.Lease, artifacts: Sequence[NewArtifact], models: Sequence[NewModel],
    summary: dict[str, Any], now: datetime, grace: timedelta,
) -> None:  # fmt: skip
    """As a worker publishes: what the models' files lie under was announced before they were stored."""
    for made in models:
        garbage.announce(db, made.storage_prefix, now)
    jobs.publish(db, lease, artifacts, models, summary, now, grace)


def add_published(db: Database, storage: Storage, *, name: str = "tickets", now: datetime = START) -> tuple[str, str]:
    """A succeeded job with real bytes behind its artifacts and its model; gives both ids."""
    add_job(db, name=name, now=now)
    lease = claim(db, now).lease
    prefix = lease.prefix
    artifacts = []
    for artifact_name, content in ARTIFACTS.items():
        stored = storage.put(io.BytesIO(content), f"{prefix}/{artifact_name}")
        holds_texts = artifact_name in ("predictions.csv", "report.html")
        artifacts.append(NewArtifact(artifact_name, stored.size_bytes, stored.sha256, stored.key, holds_texts))
    made = model(files=["manifest.json", "sub/weights.bin"])
    for file in made.files:
        storage.put(io.BytesIO(ARTIFACTS.get(file, b"weights")), f"{made.storage_prefix}/{file}")
    publish_stored(db, lease, artifacts, [made], {"headline": "fine"}, now, GRACE)
    return lease.job_id, made.id


ARTIFACTS = {
    "metrics.json": b'{"schema_version": 1}',
    "predictions.csv": b"row_id,text\n0,hello\n",
    "report.html": b"<!doctype html><p>fine</p>",
    "adapter/adapter_config.json": b"{}",
    "adapter/adapter_model.safetensors": bytes(range(256)),
    "manifest.json": b"{}",
}
