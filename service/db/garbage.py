"""Bytes that no row names: those about to be stored, and those on their way out.

What is to be stored is noted here first, and the transaction that names it takes the note away; whoever dies between
the two leaves garbage that is collected a day later, not a leak.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.core.errors import Conflict
from service.db.engine import Database
from service.db.models import Garbage

UNNAMED = timedelta(days=1)
"""How long bytes may lie in the storage before a row names them."""


def discard(session: Session, prefix: str | None, delete_after: datetime) -> None:
    if prefix is not None:
        session.add(Garbage(prefix=prefix, delete_after=delete_after))


def announce(db: Database, prefix: str, now: datetime) -> None:
    """Before the first byte is stored below `prefix`."""
    with db.write() as session:
        discard(session, prefix, now + UNNAMED)


def named(session: Session, prefixes: Sequence[str]) -> None:
    """In the transaction that names what was announced. Raises Conflict where it has been collected since."""
    # By name: an announcement whose answer was lost is there twice.
    found = session.scalars(delete(Garbage).where(Garbage.prefix.in_(prefixes)).returning(Garbage.prefix))
    if set(found) != set(prefixes):
        raise Conflict(f"Storing it took longer than {UNNAMED}, so it was given up. Send it again.")


def give_up(db: Database, prefix: str, now: datetime) -> None:
    """What was announced is not needed; without effect where a row names it, whatever became of the commit."""
    with db.write() as session:
        session.execute(update(Garbage).where(Garbage.prefix == prefix).values(delete_after=now))


def due(db: Database, now: datetime) -> list[tuple[int, str]]:
    """`(id, prefix)` of bytes whose grace time is over, the longest over first."""
    ripe = select(Garbage.id, Garbage.prefix).where(Garbage.delete_after <= now).order_by(Garbage.delete_after)
    with db.read() as session:
        return [(row.id, row.prefix) for row in session.execute(ripe.limit(100))]


def collected(db: Database, garbage_id: int) -> None:
    with db.write() as session:
        session.execute(delete(Garbage).where(Garbage.id == garbage_id))


def postpone(db: Database, garbage_id: int, until: datetime) -> None:
    """What cannot be deleted now makes room for what can."""
    with db.write() as session:
        session.execute(update(Garbage).where(Garbage.id == garbage_id).values(delete_after=until))
