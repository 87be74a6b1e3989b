"""How often things have happened to jobs and models, kept in the transaction that makes them happen, so every process
tells the same and nothing is counted twice or taken back when a job is deleted.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.db.models import Job, Tally

_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def count_end(session: Session, job: Job) -> None:
    _add(session, "ended", job.kind, job.status, 0.0)


def count_stage(session: Session, job: Job, now: datetime) -> None:
    """The stage that the job is in is over, finished or not."""
    if job.stage is not None and job.stage_started_at is not None:
        # Clocks of two machines may differ; time never runs backwards in a counter.
        _add(session, "stage", job.kind, job.stage, max((now - job.stage_started_at).total_seconds(), 0.0))


def count_deleted_model(session: Session) -> None:
    _add(session, "deleted", "model", "", 0.0)


def deleted_models(session: Session) -> int:
    """How many were ever deleted: while that is the same, a model that was found is still there."""
    return session.scalar(select(Tally.count).where(Tally.what == "deleted")) or 0


def tallied(session: Session, what: Literal["ended", "stage"]) -> Sequence[Tally]:
    return session.scalars(select(Tally).where(Tally.what == what).order_by(Tally.kind, Tally.value)).all()


def _add(session: Session, what: str, kind: str, value: str, seconds: float) -> None:
    new = _INSERT[session.get_bind().dialect.name](Tally).values(
        what=what, kind=kind, value=value, count=1, seconds=seconds
    )
    more = {"count": Tally.count + 1, "seconds": Tally.seconds + new.excluded.seconds}
    session.execute(new.on_conflict_do_update(index_elements=["what", "kind", "value"], set_=more))
