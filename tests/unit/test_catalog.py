"""Datasets, models, aliases and keys: what is found, listed, deleted and never stored in the clear."""

import hashlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, text

from service.core.errors import Conflict, NotFound
from service.db import catalog, jobs
from service.db.engine import Database
from service.db.jobs import NewModel
from service.db.models import ApiKey, Artifact, Dataset, Garbage, Job, Model
from tests.databases import fresh_database, sqlite_only
from tests.rows import GRACE, START, add_dataset, add_job, artifact, claim, model, publish_stored, read_job


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = fresh_database(tmp_path)
    yield database
    database.close()


def published(db: Database, dataset_id: str | None = None, made: NewModel | None = None) -> tuple[str, str]:
    """A succeeded job's id and its model's."""
    job_id = add_job(db, dataset_id)
    made = made or model()
    lease = claim(db).lease
    assert lease.job_id == job_id
    artifacts = [
        artifact("metrics.json", lease.prefix),
        artifact("split.csv", lease.prefix),
        artifact("predictions.csv", lease.prefix, holds_texts=True),
        artifact("report.html", lease.prefix, holds_texts=True),
    ]
    publish_stored(db, lease, artifacts, [made], {"headline": "fine"}, START, GRACE)
    return job_id, made.id


def test_lists_are_newest_first_and_go_on_behind_the_last_id_seen(db: Database) -> None:
    made = [add_dataset(db) for _ in range(5)]
    with db.read() as session:
        first, more = catalog.newest(session, Dataset, 2, None)
        assert ([row.id for row in first], more) == (made[:2:-1], True)
        rest, more = catalog.newest(session, Dataset, 3, first[-1].id)
        assert ([row.id for row in rest], more) == (made[2::-1], False)
        assert catalog.newest(session, Dataset, 3, made[0]) == ([], False)


def test_ids_made_one_after_the_other_are_sorted() -> None:
    from service.core.ids import new_id

    made = [new_id("ds") for _ in range(2000)]
    assert len(set(made)) == 2000
    assert [i[:16] for i in made] == sorted(i[:16] for i in made)


# Datasets -----------------------------------------------------------------------------------------
def test_deleting_a_dataset_deletes_the_artifacts_with_its_texts_whole_and_nothing_else(db: Database) -> None:
    kept_dataset, dataset_id = add_dataset(db), add_dataset(db)
    other_job, _ = published(db, kept_dataset)
    job_id, model_id = published(db, dataset_id)
    with db.write() as session:
        key = catalog.get_dataset(session, dataset_id).storage_key
        texts = session.scalars(select(Artifact).where(Artifact.job_id == job_id, Artifact.holds_texts)).all()
        text_keys = {row.storage_key for row in texts}
        catalog.remove_dataset(session, dataset_id, START, GRACE)
    with db.read() as session:
        assert session.get(Dataset, dataset_id) is None
        assert session.get(Dataset, kept_dataset) is not None
        names = session.scalars(select(Artifact.name).where(Artifact.job_id == job_id).order_by(Artifact.name)).all()
        assert names == ["metrics.json", "split.csv"]
        assert len(session.scalars(select(Artifact).where(Artifact.job_id == other_job)).all()) == 4
        assert session.get(Model, model_id) is not None
        assert session.get(Job, job_id) is not None
        due = session.execute(select(Garbage.prefix, Garbage.delete_after)).all()
    kept_until_published = {f"jobs/{job}/checkpoints" for job in (job_id, other_job)}
    assert {row.prefix for row in due} == {key, *text_keys, *kept_until_published}
    assert {row.delete_after for row in due} == {START + GRACE}
    assert read_job(db, job_id).summary == {"headline": "fine"}


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_a_dataset_that_a_job_still_needs_is_not_deleted(db: Database, status: str) -> None:
    dataset_id = add_dataset(db)
    job_id = add_job(db, dataset_id)
    if status != "queued":
        claim(db)
    if status == "cancelling":
        with db.write() as session:
            jobs.cancel(session, job_id, START)
    with pytest.raises(Conflict, match=job_id), db.write() as session:
        catalog.remove_dataset(session, dataset_id, START, GRACE)
    with db.read() as session:
        assert session.get(Dataset, dataset_id) is not None
        assert session.scalars(select(Garbage)).all() == []


def test_a_failed_jobs_checkpoint_goes_with_its_dataset(db: Database) -> None:
    dataset_id = add_dataset(db)
    job_id = add_job(db, dataset_id)
    lease = claim(db).lease
    jobs.keep_checkpoint(db, lease, f"jobs/{job_id}/checkpoints/epoch-1", START, GRACE)
    jobs.fail(db, lease, {"code": "internal", "message": "", "hint": None}, START, GRACE)
    with db.write() as session:
        catalog.remove_dataset(session, dataset_id, START, GRACE)
    assert read_job(db, job_id).checkpoint_prefix is None
    with db.read() as session:
        # The whole folder: an attempt that was lost while it stored one had named it nowhere.
        assert f"jobs/{job_id}/checkpoints" in set(session.scalars(select(Garbage.prefix)))


# Models and aliases -------------------------------------------------------------------------------
def test_an_alias_points_where_it_was_last_put_and_remembers_the_rest(db: Database) -> None:
    (_, first), (_, second) = published(db), published(db)
    for day, model_id in enumerate((first, second, first)):
        with db.write() as session:
            catalog.point_alias(session, "live", model_id, START + timedelta(days=day))
    with db.read() as session:
        assert catalog.find_model(session, "live").id == first
        [alias] = catalog.list_aliases(session)
        assert (alias.alias, alias.updated_at) == ("live", START + timedelta(days=2))
        assert [move.model_id for move in alias.history] == [first, second, first]
        assert catalog.aliases_of(session, [first, second]) == {first: ["live"], second: []}


def test_a_model_with_an_alias_stays_until_the_alias_points_elsewhere(db: Database) -> None:
    (_, first), (_, second) = published(db), published(db)
    with db.write() as session:
        catalog.point_alias(session, "live", first, START)
    with pytest.raises(Conflict, match="live"), db.write() as session:
        catalog.remove_model(session, first, START, GRACE)
    with db.write() as session:
        catalog.point_alias(session, "live", second, START)
    with db.write() as session:
        prefix = catalog.get_model(session, first).storage_prefix
        catalog.remove_model(session, first, START, GRACE)
    with db.read() as session:
        assert session.get(Model, first) is None
        models = [found for found in session.scalars(select(Garbage.prefix)) if found.startswith("models/")]
        assert models == [prefix]
        assert catalog.find_model(session, "live").id == second


@pytest.mark.parametrize("find", [catalog.find_model, catalog.get_model, catalog.get_dataset])
def test_what_nobody_made_is_not_found(db: Database, find: object) -> None:
    with db.read() as session, pytest.raises(NotFound):
        find(session, "mdl_0")  # type: ignore[operator]


def test_an_alias_cannot_point_to_a_model_that_is_not_there(db: Database) -> None:
    with pytest.raises(NotFound), db.write() as session:
        catalog.point_alias(session, "live", "mdl_0", START)
    with db.read() as session:
        assert catalog.list_aliases(session) == []


# Keys ---------------------------------------------------------------------------------------------
def test_of_a_key_only_the_hash_is_stored(db: Database) -> None:
    with db.write() as session:
        key, secret = catalog.create_key(session, "me", "read", START)
    assert len(secret) >= 40
    assert key.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    with db.read() as session:
        row = session.execute(select(ApiKey.__table__)).one()
    assert secret not in map(str, row)


def test_a_key_lives_until_it_is_revoked_or_expires(db: Database) -> None:
    with db.write() as session:
        live, live_secret = catalog.create_key(session, "live", "read", START)
        _, dated_secret = catalog.create_key(session, "dated", "read", START, START + timedelta(days=1))
    with db.read() as session:
        found = catalog.find_key(session, live_secret, START)
        assert found is not None
        assert found.id == live.id
        assert catalog.find_key(session, dated_secret, START + timedelta(hours=23)) is not None
        assert catalog.find_key(session, dated_secret, START + timedelta(days=1)) is None
        assert catalog.find_key(session, live_secret + "x", START) is None
        assert catalog.find_key(session, live.secret_sha256, START) is None
        assert catalog.find_key(session, "\ud800", START) is None
    with db.write() as session:
        catalog.revoke_key(session, live.id, START)
    with db.read() as session:
        assert catalog.find_key(session, live_secret, START) is None
    assert catalog.any_key_ever(db)


def test_revoking_again_keeps_the_first_time(db: Database) -> None:
    with db.write() as session:
        key, _ = catalog.create_key(session, "me", "read", START)
    for day in range(2):
        with db.write() as session:
            catalog.revoke_key(session, key.id, START + timedelta(days=day))
    with db.read() as session:
        assert catalog.list_keys(session)[0].revoked_at == START


def test_a_key_nobody_made_cannot_be_revoked(db: Database) -> None:
    with pytest.raises(NotFound), db.write() as session:
        catalog.revoke_key(session, "key_0", START)


# Workers and the database -------------------------------------------------------------------------
def test_a_worker_is_seen_for_a_while_and_forgotten_after_a_day(db: Database) -> None:
    catalog.saw_worker(db, "wrk_1", START, START)
    catalog.saw_worker(db, "wrk_2", START, START + timedelta(minutes=1))
    with db.read() as session:
        seen = catalog.workers_seen(session, START + timedelta(seconds=30))
    assert seen == ["wrk_2"]
    catalog.saw_worker(db, "wrk_3", START, START + timedelta(days=1, seconds=1))
    with db.read() as session:
        assert catalog.workers_seen(session, START) == ["wrk_2", "wrk_3"]


def test_times_come_back_in_utc_whatever_zone_they_went_in_with(db: Database) -> None:
    from datetime import timezone

    now = START.astimezone(timezone(timedelta(hours=5, minutes=30)))
    dataset_id = add_dataset(db, now=now)
    with db.read() as session:
        found = catalog.get_dataset(session, dataset_id).created_at
    assert found == START
    assert found.utcoffset() == timedelta(0)


def test_an_error_of_the_database_does_not_quote_a_text(db: Database) -> None:
    from sqlalchemy.exc import IntegrityError

    add_dataset(db)
    with db.read() as session:
        known = session.scalars(select(Dataset)).one()
    values = {column.key: getattr(known, column.key) for column in Dataset.__table__.columns}
    with pytest.raises(IntegrityError) as caught, db.write() as session:
        session.add(Dataset(**values | {"name": "a private text"}))
    assert "private" not in str(caught.value)


@sqlite_only
def test_the_database_syncs_to_the_disk_minds_foreign_keys_and_wipes_what_is_deleted(tmp_path: Path) -> None:
    db = Database(f"sqlite:///{tmp_path / 'plain.db'}")
    with db.read() as session:
        pragmas = {name: session.execute(text(f"PRAGMA {name}")).scalar() for name in
                   ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "secure_delete")}  # fmt: skip
    db.close()
    assert pragmas == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000, "secure_delete": 1
    }  # fmt: skip
