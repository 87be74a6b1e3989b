"""Webhook calls that are still to be made: a row from the commit that ends the job until the call is done with.

Several API processes may look for them. Taking one is a lease: it is due again when the lease is over, so one whose
process dies is sent by the next. `attempt` only grows, and fences what is written about the call.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session

from service.core.ids import new_id
from service.db.engine import Database
from service.db.models import Delivery, Job

LEASE = timedelta(seconds=60)
_MOST_AT_ONCE = 20


def announce(session: Session, job: Job, now: datetime) -> None:
    """Puts the news that a job has ended into the outbox, if somebody wants to hear it.

    What is told is the job as it is now, and holds no text and no label: of an error its code alone.
    """
    if job.webhook_url is None:
        return
    summary, error = job.summary or {}, job.error or {}
    told = {
        "job_id": job.id, "name": job.name, "kind": job.kind, "status": job.status, "attempt": job.attempt,
        "dataset_id": job.dataset_id, "model_id": job.model_id, "created_at": _text(job.created_at),
        "started_at": _text(job.started_at), "finished_at": _text(now), "headline": summary.get("headline"),
        "recommended_method": summary.get("recommendation", {}).get("method"), "error_code": error.get("code"),
    }  # fmt: skip
    body = {"type": f"job.{job.status}", "timestamp": _text(now), "data": told}
    session.add(
        Delivery(id=new_id("msg"), job_id=job.id, url=job.webhook_url, body=json.dumps(body), attempt=0, due_at=now)
    )


def take_due(db: Database, now: datetime) -> Sequence[Delivery]:
    """Calls to make now, each leased to this caller, its attempt counted."""
    with db.read() as session:  # most looks find nothing, and need not keep writers waiting
        if not session.scalar(select(exists().where(Delivery.due_at <= now))):
            return []
    due = select(Delivery.id).where(Delivery.due_at <= now).order_by(Delivery.due_at).limit(_MOST_AT_ONCE)
    with db.write() as session:
        return session.scalars(
            update(Delivery)
            .where(Delivery.id.in_(due.with_for_update(skip_locked=True)), Delivery.due_at <= now)
            .values(due_at=now + LEASE, attempt=Delivery.attempt + 1)
            .returning(Delivery),
            execution_options={"synchronize_session": False, "populate_existing": True},
        ).all()


def settle(session: Session, delivery: Delivery, due_at: datetime | None) -> bool:
    """Ends a call, or puts it off until `due_at`. False where it is no longer ours: somebody else has taken it."""
    ours = (Delivery.id == delivery.id, Delivery.attempt == delivery.attempt)
    change = delete(Delivery).where(*ours) if due_at is None else update(Delivery).where(*ours).values(due_at=due_at)
    options = {"synchronize_session": False}
    return session.scalar(change.returning(Delivery.id), execution_options=options) is not None


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")
