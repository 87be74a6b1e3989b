"""Datasets, models, aliases and keys: what is kept, found, listed and deleted."""

import contextlib
import hashlib
import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy import ColumnElement, delete, exists, select
from sqlalchemy.orm import Session, selectinload

from service.core.errors import Conflict, NotFound
from service.core.ids import new_id
from service.db import garbage, jobs, tallies
from service.db.engine import Database, existing
from service.db.models import Alias, AliasMove, ApiKey, Dataset, Job, Model, Worker

SCOPES = ("predict", "read", "write", "admin")
"""Each holds those before it."""

Listed = TypeVar("Listed", Dataset, Job, Model, ApiKey)


def newest(
    session: Session, table: type[Listed], limit: int, after: str | None, where: Sequence[ColumnElement[bool]] = ()
) -> tuple[list[Listed], bool]:
    """Up to `limit` rows, newest first, from the one behind `after` on; and whether there are more."""
    query = select(table).where(*where).order_by(table.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(table.id < after)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def get_dataset(session: Session, dataset_id: str, *, lock: bool = False) -> Dataset:
    dataset = session.get(Dataset, dataset_id, with_for_update=True if lock else None)
    return existing(dataset, "No dataset has that id. List them with GET /datasets.")


def remove_dataset(session: Session, dataset_id: str, now: datetime, grace: timedelta) -> None:
    """Deletes a dataset and every artifact that holds its texts; models and figures stay. Raises Conflict, NotFound."""
    dataset = get_dataset(session, dataset_id, lock=True)
    waiting = session.scalars(jobs.open_jobs_on(dataset_id).limit(1)).first()
    if waiting is not None:
        raise Conflict(f"{waiting} is still at work on this dataset. Wait for it, or cancel it, then delete.")
    jobs.drop_texts(session, dataset_id, now, grace)
    garbage.discard(session, dataset.storage_key, now + grace)
    session.delete(dataset)


def remove_old_datasets(db: Database, before: datetime, now: datetime, grace: timedelta) -> int:
    """`remove_dataset` for those uploaded before then on which no job is at work. Returns how many."""
    with db.read() as session:
        old = list(session.scalars(select(Dataset.id).where(Dataset.created_at < before)))
    removed = 0
    for dataset_id in old:  # one transaction each: others are to write in between
        with contextlib.suppress(Conflict, NotFound), db.write() as session:
            remove_dataset(session, dataset_id, now, grace)
            removed += 1
    return removed


def find_model(session: Session, id_or_alias: str, *, lock: bool = False) -> Model:
    """The model of that id, or the one an alias points to now; locked, it stays until the transaction ends."""
    pointed = select(Alias.model_id).where(Alias.alias == id_or_alias)
    query = select(Model).where((Model.id == id_or_alias) | Model.id.in_(pointed))  # no alias is like an id
    model = session.scalars(query.with_for_update(read=True) if lock else query).one_or_none()
    return existing(model, "No model has that id or alias. List them with GET /models and GET /aliases.")


def named_models(session: Session, names: Iterable[str]) -> tuple[list[Model], list[str]]:
    """The models of these ids or aliases, and the names that no model has."""
    found, unknown = [], []
    for name in names:
        try:
            found.append(find_model(session, name))
        except NotFound:
            unknown.append(name)
    return found, unknown


def models_with_alias(session: Session) -> list[Model]:
    return list(session.scalars(select(Model).where(exists().where(Alias.model_id == Model.id)).order_by(Model.id)))


def get_model(session: Session, model_id: str, *, lock: bool = False) -> Model:
    model = session.get(Model, model_id, with_for_update=True if lock else None)
    return existing(model, "No model has that id. List them with GET /models.")


def aliases_of(session: Session, model_ids: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {model_id: [] for model_id in model_ids}
    for alias in session.scalars(select(Alias).where(Alias.model_id.in_(model_ids)).order_by(Alias.alias)):
        found[alias.model_id].append(alias.alias)
    return found


def remove_model(session: Session, model_id: str, now: datetime, grace: timedelta) -> None:
    """Deletes a model. Raises Conflict while an alias points to it, or a job predicts with it."""
    model = get_model(session, model_id, lock=True)
    waiting = session.scalars(jobs.open_jobs_with(model_id).limit(1)).first()
    if waiting is not None:
        raise Conflict(f"{waiting} is still to predict with this model. Wait for it, or cancel it, then delete.")
    names = aliases_of(session, [model_id])[model_id]
    if names:
        raise Conflict(f"The alias {names[0]!r} points to this model. Point it to another one, or delete it, first.")
    garbage.discard(session, model.storage_prefix, now + grace)
    session.delete(model)
    tallies.count_deleted_model(session)


def pointed_to(session: Session, alias: str, *, lock: bool = False) -> str | None:
    """The id of the model an alias points to; locked, it stays so until the transaction ends."""
    row = session.get(Alias, alias, with_for_update=True if lock else None)
    return None if row is None else row.model_id


def point_alias(session: Session, alias: str, model_id: str, now: datetime) -> Alias:
    """Points an alias to a model, in one step for every reader."""
    get_model(session, model_id)
    row = session.get(Alias, alias, with_for_update=True)
    if row is None:
        row = Alias(alias=alias, model_id=model_id, updated_at=now)
        session.add(row)
    row.model_id, row.updated_at = model_id, now
    session.flush()  # of two that make it at once, one ends here: the newest move is always where it points
    session.add(AliasMove(alias=alias, model_id=model_id, created_at=now))
    return row


def remove_alias(session: Session, alias: str) -> None:
    """Deletes an alias; where it has pointed stays to be read. Raises NotFound."""
    row = session.get(Alias, alias, with_for_update=True)
    session.delete(existing(row, "No alias has that name. List them with GET /aliases."))


def moves_of(session: Session, alias: str) -> list[AliasMove]:
    """Where an alias has pointed, newest first, also once it is deleted. Raises NotFound where it never was."""
    moves = list(session.scalars(select(AliasMove).where(AliasMove.alias == alias).order_by(AliasMove.id.desc())))
    return existing(moves or None, "There never was an alias of that name. List them with GET /aliases.")


def list_aliases(session: Session) -> list[Alias]:
    """Every alias, with its history."""
    return list(session.scalars(select(Alias).options(selectinload(Alias.history)).order_by(Alias.alias)))


def create_key(
    session: Session,
    name: str,
    scope: str,
    now: datetime,
    expires_at: datetime | None = None,
    secret: str | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its secret, which is shown this once and stored only as a hash."""
    secret = secret or f"tp_{secrets.token_urlsafe(32)}"
    key = ApiKey(
        id=new_id("key"), name=name, scope=scope, secret_sha256=hash_of(secret), created_at=now, expires_at=expires_at
    )
    session.add(key)
    return key, secret


def find_key(session: Session, secret: str, now: datetime) -> ApiKey | None:
    """The live key of that secret. Looked up by its hash, so timing tells nothing about other secrets."""
    key = session.scalars(select(ApiKey).where(ApiKey.secret_sha256 == hash_of(secret))).one_or_none()
    return key if key is not None and is_live(key, now) else None


def is_live(key: ApiKey, now: datetime) -> bool:
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)


def any_key_ever(db: Database) -> bool:
    with db.read() as session:
        return bool(session.scalar(select(exists().select_from(ApiKey))))


def list_keys(session: Session) -> list[ApiKey]:
    return list(session.scalars(select(ApiKey).order_by(ApiKey.id)))


def revoke_key(session: Session, key_id: str, now: datetime) -> None:
    key = existing(
        session.get(ApiKey, key_id), "No key has that id. List them with GET /keys or `tuneproof keys list`."
    )
    key.revoked_at = key.revoked_at or now


def saw_worker(db: Database, worker_id: str, started_at: datetime, now: datetime) -> None:
    """A worker's sign of life; those silent for a day are forgotten."""
    with db.write() as session:
        session.merge(Worker(id=worker_id, started_at=started_at, seen_at=now))
        session.execute(delete(Worker).where(Worker.seen_at < now - timedelta(days=1)))


def workers_seen(session: Session, since: datetime) -> list[str]:
    """Their ids."""
    return list(session.scalars(select(Worker.id).where(Worker.seen_at >= since).order_by(Worker.id)))


def hash_of(secret: str) -> str:
    """What is kept of a key's secret, or of a session's token, in its place."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
