"""The queue: submit, claim, renew, finish. One transaction each; the time is always passed in.

A claim is a lease. Whatever a worker writes, it first locks the row that has its job, attempt and token, so one that
lost its lease changes nothing: it gets `LeaseLost`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from service.core.errors import Conflict, LeaseLost, QueueFull
from service.core.ids import new_id, new_token
from service.db import garbage, outbox, tallies
from service.db.engine import Database, existing, take_turns
from service.db.models import Artifact, Dataset, Event, Job, Model

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
        session.get(Dataset, dataset_id, with_for_update={"read": True}),
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


def refuse_on_full_queue(session: Session, most: int) -> None:
    """Raises QueueFull where `most` jobs wait for a worker already; until this transaction ends nobody else counts."""
    take_turns(session, "the queue")
    if session.scalars(select(func.count()).where(Job.status == "queued")).one() >= most:
        raise QueueFull(
            f"As many jobs wait for a worker as may, {most} (TUNEPROOF_MAX_QUEUED_JOBS). Ask again in a minute, or "
            "start more workers.",
            retry_after_seconds=60,
        )


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
        job = _held(session, lease)
        job.lease_expires_at = now + timedelta(seconds=lease_seconds)
        return job.status


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
    with db.write() as session:
        job = _held(session, lease)
        if progress is not None:
            if progress.stage != job.stage:
                tallies.count_stage(session, job, now)
                job.stage, job.stage_started_at = progress.stage, now
            job.progress_fraction, job.progress_message = progress.fraction, progress.message
            job.eta_seconds = progress.eta_seconds
        if spec is not None:
            job.spec = spec
        for level, kind, message, data in events:
            add_event(session, lease.job_id, kind, message, now, level=level, data=data)


def keep_checkpoint(db: Database, lease: Lease, prefix: str, now: datetime, grace: timedelta) -> None:
    """Names the checkpoint the next attempt goes on from; the one before it becomes garbage. Raises LeaseLost."""
    with db.write() as session:
        job = _held(session, lease)
        if job.checkpoint_prefix != prefix:
            garbage.discard(session, job.checkpoint_prefix, now + grace)
            job.checkpoint_prefix = prefix


def publish(
    db: Database, lease: Lease, artifacts: Sequence[NewArtifact], models: Sequence[NewModel],
    summary: dict[str, Any], now: datetime, grace: timedelta,
) -> None:  # fmt: skip
    """The moment of publishing: artifact rows, models and the final status in one fenced transaction.

    Raises:
        LeaseLost: another attempt holds the job, or it was cancelled in the meantime.
    """
    with db.write() as session:
        job = _held(session, lease, statuses=("running",))
        # All of them: one whose worker was lost before it was kept has no other trace.
        garbage.discard(session, f"jobs/{job.id}/checkpoints", now + grace)
        job.checkpoint_prefix, job.error, job.summary = None, None, summary
        job.progress_fraction, job.progress_message = 1.0, "done"
        job.model_id = next((model.id for model in models if model.method == "lora"), job.model_id)
        name = job.name
        garbage.named(session, [model.storage_prefix for model in models])
        take_turns(session, f"versions of {name}")
        version = session.scalars(select(func.coalesce(func.max(Model.version), 0)).where(Model.name == name)).one()
        session.add_all(Artifact(job_id=lease.job_id, **asdict(artifact)) for artifact in artifacts)
        session.add_all(
            Model(name=name, version=version + i, job_id=lease.job_id, created_at=now, **asdict(model))
            for i, model in enumerate(models, 1)
        )
        _end(session, job, "succeeded", "succeeded", now)
        job.eta_seconds = 0.0


def was_published(db: Database, lease: Lease) -> bool:
    """Whether this attempt has published: its commit may have arrived where the answer to it did not."""
    theirs = select(Artifact.job_id).where(
        Artifact.job_id == lease.job_id, Artifact.storage_key.startswith(f"{lease.prefix}/", autoescape=True)
    )
    with db.read() as session:
        return session.scalars(theirs.limit(1)).first() is not None


def fail(db: Database, lease: Lease, error: dict[str, Any], now: datetime, grace: timedelta) -> None:
    """Ends the job for good: trying again would end the same way. Raises LeaseLost."""
    with db.write() as session:
        job = _held(session, lease)
        garbage.discard(session, lease.prefix, now + grace)
        _fail(session, job, error, now)


def lose(db: Database, lease: Lease, reason: str, max_attempts: int, now: datetime, grace: timedelta) -> None:
    """An attempt died. The job is queued again, or ends as `worker_lost` after too many. Raises LeaseLost."""
    with db.write() as session:
        _lose(session, _held(session, lease), reason, max_attempts, now, grace)


def give_back(db: Database, lease: Lease, now: datetime, grace: timedelta) -> None:
    """A worker that is told to stop: the job is queued again and no failure is counted. Raises LeaseLost.

    One that was being cancelled ends cancelled: there is nothing left to stop.
    """
    with db.write() as session:
        job = _held(session, lease)
        garbage.discard(session, lease.prefix, now + grace)
        if job.status == "cancelling":
            _end(session, job, "cancelled", "cancelled", now)
            return
        tallies.count_stage(session, job, now)
        _queue(job)
        add_event(session, job.id, "status", "queued again: its worker was stopped", now)


def confirm_cancelled(db: Database, lease: Lease, now: datetime, grace: timedelta) -> None:
    """The attempt has stopped, as was asked. Raises LeaseLost."""
    with db.write() as session:
        job = _held(session, lease)
        garbage.discard(session, lease.prefix, now + grace)
        _end(session, job, "cancelled", "cancelled", now)


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
        _end(session, job, "cancelled", "cancelled", now)
    elif job.status == "running":
        job.status = "cancelling"
        add_event(session, job.id, "status", "cancelling", now)
    return job


def retry(session: Session, job_id: str, now: datetime) -> Job:
    """Queues a failed or cancelled job again; it goes on from its last checkpoint. Raises NotFound, Conflict."""
    dataset_id = get(session, job_id).dataset_id
    # Before the job, as where the dataset is deleted; it stays until the job is queued.
    dataset = session.get(Dataset, dataset_id, with_for_update={"read": True})
    job = get(session, job_id, lock=True)
    if job.status not in ("failed", "cancelled"):
        raise Conflict(f"Only a failed or cancelled job can be retried; this one is {job.status}.")
    if dataset is None:
        raise Conflict("The job's dataset was deleted. Upload it again and start a new job.")
    if job.model_id is not None and session.get(Model, job.model_id, with_for_update={"read": True}) is None:
        raise Conflict("The model that the job predicts with was deleted. Start a new job with another one.")
    _queue(job)
    job.failures, job.error, job.finished_at = 0, None, None
    add_event(session, job.id, "status", "queued again: retry", now)
    return job


def remove(session: Session, job_id: str, now: datetime, grace: timedelta) -> None:
    """Deletes a job that has ended, its events and artifacts; its models stay. Raises NotFound, Conflict."""
    job = get(session, job_id, lock=True)
    if job.status not in TERMINAL:
        raise Conflict(f"The job is {job.status}. Cancel it first with POST /jobs/{job_id}/cancel.")
    garbage.discard(session, f"jobs/{job_id}", now + grace)
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
    options = {"synchronize_session": False}
    # A checkpoint holds weights, or texts that are labelled already; without the others the job cannot go on from it.
    # All of a job's are discarded: one whose attempt was lost before it was kept has no other trace.
    # Statements, and jobs first: somebody else may be deleting one of them, and its artifacts with it.
    kept = update(Job).where(Job.dataset_id == dataset_id).values(checkpoint_prefix=None).returning(Job.id)
    job_ids = session.scalars(kept, execution_options=options).all()
    texts = delete(Artifact).where(Artifact.job_id.in_(job_ids), Artifact.holds_texts).returning(Artifact.storage_key)
    keys = session.scalars(texts, execution_options=options).all()
    for prefix in (*keys, *(f"jobs/{job_id}/checkpoints" for job_id in job_ids)):
        garbage.discard(session, prefix, now + grace)


def add_event(
    session: Session, job_id: str, kind: EventType, message: str, now: datetime, *, level: Level = "info",
    data: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    session.add(Event(job_id=job_id, created_at=now, level=level, type=kind, message=message, data=data or {}))


def _held(session: Session, lease: Lease, statuses: Sequence[str] = HELD) -> Job:
    """The job, to be written to under the lease: locked until the transaction ends. Raises LeaseLost."""
    mine = (Job.id == lease.job_id, Job.attempt == lease.attempt, Job.lease_token == lease.token)
    job = session.scalars(select(Job).where(*mine, Job.status.in_(statuses)).with_for_update()).one_or_none()
    if job is None:
        raise _lost(lease)
    return job


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"Attempt {lease.attempt} no longer holds the job; its results are not used.")


def _let_go(job: Job) -> None:
    job.lease_token = job.lease_expires_at = job.worker_id = job.eta_seconds = None


def _queue(job: Job) -> None:
    _let_go(job)
    job.status, job.stage, job.progress_fraction, job.progress_message = "queued", None, 0.0, ""


def _end(
    session: Session, job: Job, status: str, message: str, now: datetime, *, level: Level = "info",
    data: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """What every end of a job goes through, in the transaction that ends it: its event, its tallies, its webhook."""
    _let_go(job)
    job.status, job.finished_at = status, now
    add_event(session, job.id, "status", message, now, level=level, data=data)
    tallies.count_stage(session, job, now)
    tallies.count_end(session, job)
    outbox.announce(session, job, now)


def _fail(session: Session, job: Job, error: dict[str, Any], now: datetime) -> None:
    job.error = error
    _end(session, job, "failed", f"failed: {error['message']}", now, level="error", data=error)


def _lose(session: Session, job: Job, reason: str, max_attempts: int, now: datetime, grace: timedelta) -> None:
    assert job.lease_token is not None  # it is held
    garbage.discard(session, Lease(job.id, job.attempt, job.lease_token).prefix, now + grace)
    job.failures += 1
    if job.status == "cancelling":
        _end(session, job, "cancelled", f"cancelled; {reason}", now)
    elif job.failures >= max_attempts:
        error = {
            "code": "worker_lost", "message": f"Attempt {job.attempt} ended: {reason}. "
            f"After {job.failures} lost attempts the job is given up.",
            "hint": "Most often memory ran out, and the system's log (dmesg) says so; POST /jobs/{id}/retry goes on "
            "from the last checkpoint.",
        }  # fmt: skip
        _fail(session, job, error, now)
    else:
        tallies.count_stage(session, job, now)
        _queue(job)
        message = f"attempt {job.attempt} ended: {reason}; queued again"
        add_event(session, job.id, "status", message, now, level="warning", data={"failures": job.failures})
