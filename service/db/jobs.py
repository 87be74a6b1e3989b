"""The queue: submit, claim, renew, finish. One statement each; the time is always passed in.

A claim is a lease. Everything a worker writes filters on job, attempt and token, so one that lost its lease changes
nothing: it gets `LeaseLost`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import CursorResult, Select, delete, func, select, update
from sqlalchemy.orm import Session

from service.core.errors import Conflict, LeaseLost
from service.core.ids import new_id, new_token
from service.db import outbox, tallies
from service.db.engine import Database, existing
from service.db.models import Artifact, Dataset, Event, Garbage, Job, Model

Level = Literal["info", "warning", "error"]
EventType = Literal["status", "progress", "metric", "message"]
STATUSES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")
HELD = ("running", "cancelling")
NO_SUCH_JOB = "No job has that id. List them with GET /jobs."


@dataclass(frozen=True)
class Lease:
    """The right to write to a job, until it expires."""

    job_id: str
    attempt: int
    token: str

    @property
    def prefix(self) -> str:
        """Where this attempt's files go; no other attempt ever writes there."""
        return f"jobs/{self.job_id}/{self.attempt}-{self.token}"


@dataclass(frozen=True)
class Claimed:
    """A job as its worker got it."""

    lease: Lease
    kind: str
    name: str
    spec: dict[str, Any]
    dataset_id: str
    checkpoint_prefix: str | None


@dataclass(frozen=True)
class NewArtifact:
    name: str
    size_bytes: int
    sha256: str
    storage_key: str
    holds_texts: bool


@dataclass(frozen=True)
class NewModel:
    id: str
    method: str
    base_model: str
    base_revision: str
    labels: list[str]
    metrics: dict[str, Any]
    size_bytes: int
    storage_prefix: str
    files: list[str]
    calibration: dict[str, Any] | None = None


def submit(
    session: Session, *, kind: str, name: str, dataset_id: str, spec: dict[str, Any], metadata: dict[str, Any],
    now: datetime, webhook_url: str | None = None, model_id: str | None = None,
) -> Job:  # fmt: skip
    """Queues a job; `model_id` is the model it is to predict with. Raises NotFound where its dataset is gone."""
    existing(
        session.get(Dataset, dataset_id),
        "No dataset has that id. List them with GET /datasets, or upload one with POST /datasets.",
    )
    job = Job(
        id=new_id("job"), kind=kind, name=name, status="queued", stage=None, dataset_id=dataset_id, model_id=model_id,
        spec=spec, job_metadata=metadata, summary=None, error=None, created_at=now, webhook_url=webhook_url,
    )  # fmt: skip
    session.add(job)
    session.flush()
    add_event(session, job.id, "status", "queued", now)
    return job


def claim(db: Database, worker_id: str, now: datetime, lease_seconds: float) -> Claimed | None:
    """Takes the oldest queued job, or nothing."""
    oldest = (
        select(Job.id).where(Job.status == "queued").order_by(Job.id).limit(1).with_for_update(skip_locked=True)
    ).scalar_subquery()
    with db.write() as session:
        job = session.scalars(
            update(Job)
            .where(Job.id == oldest, Job.status == "queued")
            .values(
                status="running", stage="prepare", attempt=Job.attempt + 1, lease_token=new_token(),
                lease_expires_at=now + timedelta(seconds=lease_seconds), worker_id=worker_id,
                started_at=func.coalesce(Job.started_at, now), progress_fraction=0.0, progress_message="starting",
                eta_seconds=None, error=None, stage_started_at=now,
            )
            .returning(Job),
            execution_options={"synchronize_session": False, "populate_existing": True},
        ).one_or_none()  # fmt: skip
        if job is None:
            return None
        assert job.lease_token is not None  # just set
        add_event(session, job.id, "status", f"attempt {job.attempt} started", now, data={"attempt": job.attempt})
        lease = Lease(job.id, job.attempt, job.lease_token)
        return Claimed(lease, job.kind, job.name, job.spec, job.dataset_id, job.checkpoint_prefix)


def renew(db: Database, lease: Lease, now: datetime, lease_seconds: float) -> str:
    """Prolongs the lease; gives the job's status (`running` or `cancelling`). Raises LeaseLost."""
    with db.write() as session:
        _held(session, lease, {"lease_expires_at": now + timedelta(seconds=lease_seconds)})
        return session.scalars(select(Job.status).where(Job.id == lease.job_id)).one()


def status_under(db: Database, lease: Lease) -> str:
    """The job's status, without renewing anything. Raises LeaseLost."""
    with db.read() as session:
        job = session.get(Job, lease.job_id)
    if job is None or (job.attempt, job.lease_token) != (lease.attempt, lease.token):
        raise _lost(lease)
    return job.status


@dataclass(frozen=True)
class Progress:
    """Where a running job stands; `stage` is one of the contract's."""

    stage: str
    fraction: float
    message: str
    eta_seconds: float | None


def report(
    db: Database, lease: Lease, now: datetime, progress: Progress | None = None,
    events: Sequence[tuple[Level, EventType, str, dict[str, Any]]] = (), spec: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes what a running attempt has to say, in one transaction. Raises LeaseLost."""
    values: dict[str, Any] = {}
    if progress is not None:
        values = {
            "stage": progress.stage, "progress_fraction": progress.fraction, "progress_message": progress.message,
            "eta_seconds": progress.eta_seconds,
        }  # fmt: skip
    if spec is not None:
        values["spec"] = spec
    with db.write() as session:
        before = None if progress is None else session.get(Job, lease.job_id)
        moved = before is not None and values["stage"] != before.stage
        _held(session, lease, values | ({"stage_started_at": now} if moved else {}))
        if before is not None and moved:
            tallies.count_stage(session, before, now)
        for level, kind, message, data in events:
            add_event(session, lease.job_id, kind, message, now, level=level, data=data)


def keep_checkpoint(db: Database, lease: Lease, prefix: str, now: datetime, grace: timedelta) -> None:
    """Names the checkpoint the next attempt goes on from; the one before it becomes garbage. Raises LeaseLost."""
    with db.write() as session:
        before = session.scalars(select(Job.checkpoint_prefix).where(Job.id == lease.job_id)).one_or_none()
        _held(session, lease, {"checkpoint_prefix": prefix})
        if before != prefix:
            _discard(session, before, now + grace)


def publish(
    db: Database, lease: Lease, artifacts: Sequence[NewArtifact], models: Sequence[NewModel],
    summary: dict[str, Any], now: datetime, grace: timedelta,
) -> None:  # fmt: skip
    """The moment of publishing: artifact rows, models and the final status in one fenced transaction.

    Raises:
        LeaseLost: another attempt holds the job, or it was cancelled in the meantime.
    """
    with db.write() as session:
        checkpoint = session.scalars(select(Job.checkpoint_prefix).where(Job.id == lease.job_id)).one_or_none()
        lora = next((model.id for model in models if model.method == "lora"), None)
        final = {
            "status": "succeeded", "finished_at": now, "summary": summary, "progress_fraction": 1.0,
            "progress_message": "done", "eta_seconds": 0.0, "checkpoint_prefix": None, "error": None,
        } | ({} if lora is None else {"model_id": lora})  # fmt: skip
        _held(session, lease, final | _NO_LEASE, statuses=("running",))
        name = session.scalars(select(Job.name).where(Job.id == lease.job_id)).one()
        version = session.scalars(select(func.coalesce(func.max(Model.version), 0)).where(Model.name == name)).one()
        session.add_all(Artifact(job_id=lease.job_id, **asdict(artifact)) for artifact in artifacts)
        session.add_all(
            Model(name=name, version=version + i, job_id=lease.job_id, created_at=now, **asdict(model))
            for i, model in enumerate(models, 1)
        )
        _discard(session, checkpoint, now + grace)
        _ended(session, lease.job_id, "succeeded", now)


def fail(db: Database, lease: Lease, error: dict[str, Any], now: datetime, grace: timedelta) -> None:
    """Ends the job for good: trying again would end the same way. Raises LeaseLost."""
    with db.write() as session:
        _held(session, lease, {"status": "failed", "finished_at": now, "error": error, "eta_seconds": None} | _NO_LEASE)
        _discard(session, lease.prefix, now + grace)
        _ended(session, lease.job_id, f"failed: {error['message']}", now, level="error", data=error)


def lose(db: Database, lease: Lease, reason: str, max_attempts: int, now: datetime, grace: timedelta) -> None:
    """An attempt died. The job is queued again, or ends as `worker_lost` after too many. Raises LeaseLost."""
    with db.write() as session:
        job = session.get(Job, lease.job_id, with_for_update=True)
        if job is None or (job.attempt, job.lease_token) != (lease.attempt, lease.token) or job.status not in HELD:
            raise _lost(lease)
        _lose(session, job, reason, max_attempts, now, grace)


def give_back(db: Database, lease: Lease, now: datetime, grace: timedelta) -> None:
    """A worker that is told to stop: the job is queued again and no failure is counted. Raises LeaseLost.

    One that was being cancelled ends cancelled: there is nothing left to stop.
    """
    with db.write() as session:
        _held(session, lease, {})
        status = session.scalars(select(Job.status).where(Job.id == lease.job_id)).one()
        if status == "cancelling":
            _end_cancelled(session, lease, now, grace)
            return
        tallies.count_stage(session, get(session, lease.job_id), now)
        _held(session, lease, _QUEUED | _NO_LEASE)
        _discard(session, lease.prefix, now + grace)
        add_event(session, lease.job_id, "status", "queued again: its worker was stopped", now)


def confirm_cancelled(db: Database, lease: Lease, now: datetime, grace: timedelta) -> None:
    """The attempt has stopped, as was asked. Raises LeaseLost."""
    with db.write() as session:
        _end_cancelled(session, lease, now, grace)


def reap(db: Database, now: datetime, max_attempts: int, grace: timedelta) -> int:
    """Takes jobs from workers that have been silent for longer than their lease. Returns how many."""
    expired, taken = select(Job).where(Job.status.in_(HELD), Job.lease_expires_at < now).limit(1), 0
    while True:
        with db.read() as session:  # looked at first: a write would hold up every other one
            if session.scalars(expired).first() is None:
                return taken
        # One transaction each: two that end several jobs would take their rows, and the tallies', in different orders.
        with db.write() as session:
            job = session.scalars(expired.with_for_update(skip_locked=True)).first()
            if job is None:
                return taken
            _lose(session, job, "its worker was lost (no sign of life within the lease)", max_attempts, now, grace)
        taken += 1


def cancel(session: Session, job_id: str, now: datetime) -> Job:
    """Cancels a queued job at once, asks a running one's worker to stop. Raises NotFound, Conflict."""
    job = get(session, job_id, lock=True)
    if job.status in TERMINAL:
        raise Conflict(f"The job has already ended ({job.status}); there is nothing to cancel.")
    if job.status == "queued":
        job.status, job.finished_at = "cancelled", now
        _ended(session, job.id, "cancelled", now)
    elif job.status == "running":
        job.status = "cancelling"
        add_event(session, job.id, "status", "cancelling", now)
    return job


def retry(session: Session, job_id: str, now: datetime) -> Job:
    """Queues a failed or cancelled job again; it goes on from its last checkpoint. Raises NotFound, Conflict."""
    job = get(session, job_id, lock=True)
    if job.status not in ("failed", "cancelled"):
        raise Conflict(f"Only a failed or cancelled job can be retried; this one is {job.status}.")
    if session.get(Dataset, job.dataset_id) is None:
        raise Conflict("The job's dataset was deleted. Upload it again and start a new job.")
    if job.model_id is not None and session.get(Model, job.model_id, with_for_update={"read": True}) is None:
        raise Conflict("The model that the job predicts with was deleted. Start a new job with another one.")
    for name, value in _QUEUED.items():
        setattr(job, name, value)
    job.failures, job.error, job.finished_at = 0, None, None
    add_event(session, job.id, "status", "queued again: retry", now)
    return job


def remove(session: Session, job_id: str, now: datetime, grace: timedelta) -> None:
    """Deletes a job that has ended, its events and artifacts; its models stay. Raises NotFound, Conflict."""
    job = get(session, job_id, lock=True)
    if job.status not in TERMINAL:
        raise Conflict(f"The job is {job.status}. Cancel it first with POST /jobs/{job_id}/cancel.")
    _discard(session, f"jobs/{job_id}", now + grace)
    session.delete(job)


def get(session: Session, job_id: str, *, lock: bool = False) -> Job:
    return existing(session.get(Job, job_id, with_for_update=True if lock else None), NO_SUCH_JOB)


def open_jobs_on(dataset_id: str) -> Select[str]:
    """Ids of jobs on the dataset that have not ended."""
    return select(Job.id).where(Job.dataset_id == dataset_id, Job.status.not_in(TERMINAL))


def open_jobs_with(model_id: str) -> Select[str]:
    """Ids of jobs that have not ended and predict with the model."""
    return select(Job.id).where(Job.model_id == model_id, Job.status.not_in(TERMINAL))


def drop_texts(session: Session, dataset_id: str, now: datetime, grace: timedelta) -> None:
    """Deletes the artifacts that hold texts of a dataset, of all its jobs."""
    of_dataset = select(Job.id).where(Job.dataset_id == dataset_id)
    found = session.scalars(select(Artifact).where(Artifact.job_id.in_(of_dataset), Artifact.holds_texts)).all()
    for artifact in found:
        _discard(session, artifact.storage_key, now + grace)
        session.delete(artifact)
    # A checkpoint holds weights, or texts that are labelled already; without the others the job cannot go on from it.
    # All of a job's are discarded: one whose attempt was lost before it was kept has no other trace.
    for job in session.scalars(select(Job).where(Job.dataset_id == dataset_id)):
        _discard(session, f"jobs/{job.id}/checkpoints", now + grace)
        job.checkpoint_prefix = None


def add_event(
    session: Session, job_id: str, kind: EventType, message: str, now: datetime, *, level: Level = "info",
    data: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    session.add(Event(job_id=job_id, created_at=now, level=level, type=kind, message=message, data=data or {}))


def due_garbage(db: Database, now: datetime) -> list[tuple[int, str]]:
    """`(id, prefix)` of bytes whose grace time is over."""
    with db.read() as session:
        due = session.execute(select(Garbage.id, Garbage.prefix).where(Garbage.delete_after <= now).limit(100))
        return [(row.id, row.prefix) for row in due]


def collected(db: Database, garbage_id: int) -> None:
    with db.write() as session:
        session.execute(delete(Garbage).where(Garbage.id == garbage_id))


_NO_LEASE: dict[str, Any] = {"lease_token": None, "lease_expires_at": None, "worker_id": None}
_QUEUED: dict[str, Any] = {
    "status": "queued", "stage": None, "progress_fraction": 0.0, "progress_message": "", "eta_seconds": None,
}  # fmt: skip


def _held(session: Session, lease: Lease, values: dict[str, Any], statuses: Sequence[str] = HELD) -> None:
    """Writes to the job under the lease, or raises LeaseLost; with no values it only checks."""
    result = session.execute(
        update(Job)
        .where(
            Job.id == lease.job_id, Job.attempt == lease.attempt, Job.lease_token == lease.token,
            Job.status.in_(statuses),
        )
        .values(**(values or {"attempt": lease.attempt})),
        execution_options={"synchronize_session": False},
    )  # fmt: skip
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        raise _lost(lease)


def _end_cancelled(session: Session, lease: Lease, now: datetime, grace: timedelta) -> None:
    _held(session, lease, {"status": "cancelled", "finished_at": now, "eta_seconds": None} | _NO_LEASE)
    _discard(session, lease.prefix, now + grace)
    _ended(session, lease.job_id, "cancelled", now)


def _ended(
    session: Session, job_id: str, message: str, now: datetime, *, level: Level = "info",
    data: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """What every end of a job goes through, in the transaction that ends it: its event, its tallies, its webhook."""
    session.flush()
    job = session.get_one(Job, job_id, populate_existing=True)  # `_held` writes past the session
    add_event(session, job_id, "status", message, now, level=level, data=data)
    tallies.count_stage(session, job, now)
    tallies.count_end(session, job)
    outbox.announce(session, job, now)


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"Attempt {lease.attempt} no longer holds the job; its results are not used.")


def _lose(session: Session, job: Job, reason: str, max_attempts: int, now: datetime, grace: timedelta) -> None:
    assert job.lease_token is not None  # it is held
    _discard(session, Lease(job.id, job.attempt, job.lease_token).prefix, now + grace)
    cancelled = job.status == "cancelling"
    for name, value in _NO_LEASE.items():
        setattr(job, name, value)
    job.failures += 1
    job.eta_seconds = None
    if cancelled:
        job.status, job.finished_at = "cancelled", now
        _ended(session, job.id, f"cancelled; {reason}", now)
    elif job.failures >= max_attempts:
        error = {
            "code": "worker_lost", "message": f"Attempt {job.attempt} ended: {reason}. "
            f"After {job.failures} lost attempts the job is given up.",
            "hint": "See the worker's log for what killed it (often a lack of memory); POST /jobs/{id}/retry goes on "
            "from the last checkpoint.",
        }  # fmt: skip
        job.status, job.finished_at, job.error = "failed", now, error
        _ended(session, job.id, f"failed: {error['message']}", now, level="error", data=error)
    else:
        tallies.count_stage(session, job, now)
        for name, value in _QUEUED.items():
            setattr(job, name, value)
        message = f"attempt {job.attempt} ended: {reason}; queued again"
        add_event(session, job.id, "status", message, now, level="warning", data={"failures": job.failures})


def _discard(session: Session, prefix: str | None, delete_after: datetime) -> None:
    if prefix is not None:
        session.add(Garbage(prefix=prefix, delete_after=delete_after))
