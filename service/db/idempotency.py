"""Answers kept under their Idempotency-Key, so that a request sent twice creates once.

A caller takes the key, and writes the answer in the transaction that creates what it speaks of. Who finishes first
wins; whoever comes to write second finds the answer there and creates nothing. So nothing hangs on a process that died
while it was answering: its hold on the key just runs out.
"""

import hashlib
import secrets
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.core.errors import IdempotencyKeyReused
from service.db.engine import Database
from service.db.models import IdempotentAnswer

KEPT = timedelta(hours=24)
HELD = timedelta(seconds=60)
"""How long others wait for whoever took a key; past it they do the work themselves."""


class AnsweredElsewhere(Exception):
    """Another answered under this key meanwhile; what this transaction created must not be committed."""


@dataclass(frozen=True)
class Claim:
    """The right to answer under a key; `key_sha256` is empty where a request came without one."""

    caller: str
    key_sha256: str
    request_sha256: str
    token: str


@dataclass(frozen=True)
class Answer:
    """A status, a JSON body and a Location. `token` is that of the claim it was made under."""

    status: int
    body: dict[str, Any]
    location: str | None
    token: str
    replayed: bool = False


def unkeyed() -> Claim:
    return Claim("", "", "", secrets.token_hex(32))


def claim(db: Database, caller: str, key: str, request_sha256: str, now: datetime) -> Claim | Answer | None:
    """The right to answer, or the answer that was given, or None while another is at it.

    Raises:
        IdempotencyKeyReused: the key stands for another request.
    """
    mine = Claim(caller, hashlib.sha256(key.encode()).hexdigest(), request_sha256, secrets.token_hex(32))
    where = (caller, mine.key_sha256)
    with db.read() as session:
        row = session.get(IdempotentAnswer, where)
    if row is not None and not _is_free(row, now):
        return _answer(row, mine)
    try:
        with db.write() as session:
            row = session.get(IdempotentAnswer, where, with_for_update=True)
            if row is not None and not _is_free(row, now):
                return _answer(row, mine)
            taken = {"created_at": now, "taken_until": now + HELD, "status": None, "body": None, "location": None}
            if row is None:  # no merge: it would look again, and overwrite an answer that was given since
                session.add(IdempotentAnswer(**asdict(mine), **taken))
            else:
                for name, value in (asdict(mine) | taken).items():
                    setattr(row, name, value)
    except IntegrityError:
        return None  # another took it in the same moment
    return mine


def _is_free(row: IdempotentAnswer, now: datetime) -> bool:
    return row.created_at <= now - KEPT or (row.status is None and row.taken_until <= now)


def _answer(row: IdempotentAnswer, mine: Claim) -> Answer | None:
    if row.request_sha256 != mine.request_sha256:
        raise IdempotencyKeyReused(
            "This Idempotency-Key was sent before with another request. Send a new key with each new request; the same "
            "key is for sending the same request again."
        )
    return None if row.status is None else Answer(row.status, row.body or {}, row.location, row.token, replayed=True)


def keep(session: Session, mine: Claim, status: int, body: dict[str, Any], location: str | None) -> Answer:
    """Writes the answer, in the transaction that creates what it speaks of.

    Raises:
        AnsweredElsewhere: another answered under this key meanwhile; the transaction must not be committed.
    """
    if mine.key_sha256:
        written = session.scalar(
            update(IdempotentAnswer)
            .where(
                IdempotentAnswer.caller == mine.caller, IdempotentAnswer.key_sha256 == mine.key_sha256,
                IdempotentAnswer.request_sha256 == mine.request_sha256, IdempotentAnswer.status.is_(None),
            )
            .values(status=status, body=body, location=location, token=mine.token)
            .returning(IdempotentAnswer.token)
        )  # fmt: skip
        if written is None:
            raise AnsweredElsewhere
    return Answer(status, body, location, mine.token)


def give_back(db: Database, mine: Claim) -> None:
    """After an error: nothing was created, so the key stands for nothing yet."""
    with db.write() as session:
        session.execute(
            delete(IdempotentAnswer).where(
                IdempotentAnswer.caller == mine.caller, IdempotentAnswer.key_sha256 == mine.key_sha256,
                IdempotentAnswer.token == mine.token, IdempotentAnswer.status.is_(None),
            )
        )  # fmt: skip


def forget_old(db: Database, now: datetime) -> None:
    with db.write() as session:
        session.execute(delete(IdempotentAnswer).where(IdempotentAnswer.created_at <= now - KEPT))
