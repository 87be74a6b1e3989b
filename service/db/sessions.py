"""Sessions of browsers: a cookie's token, kept as a hash, stands for a key until it ends or the key does."""

import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from service.db.catalog import hash_of, is_live
from service.db.engine import Database
from service.db.models import ApiKey, BrowserSession

LASTS = timedelta(days=7)


def open_session(session: Session, key: ApiKey, now: datetime) -> str:
    """A new session for a live key; gives its token, which is not the key's secret and is stored only as a hash."""
    token = secrets.token_urlsafe(32)
    session.add(BrowserSession(token_sha256=hash_of(token), key_id=key.id, expires_at=now + LASTS))
    return token


def key_of(session: Session, token: str, now: datetime) -> ApiKey | None:
    """The live key that the token stands for."""
    found = session.get(BrowserSession, hash_of(token))
    if found is None or found.expires_at <= now:
        return None
    key = session.get_one(ApiKey, found.key_id)
    return key if is_live(key, now) else None


def end_session(session: Session, token: str) -> None:
    session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == hash_of(token)))


def forget_ended(db: Database, now: datetime) -> None:
    with db.write() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.expires_at <= now))
