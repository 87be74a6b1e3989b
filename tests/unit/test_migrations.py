"""From an empty database to the newest one and back, with rows in it, and by two processes at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from service.__main__ import main
from service.db import catalog
from service.db.engine import Database, alembic_config, migrate
from service.db.models import Base, Dataset
from tests.databases import database_url, sqlite_only
from tests.rows import GRACE, START, add_job, artifact, claim, model, publish_stored
from worker.__main__ import main as worker


@pytest.fixture
def url(tmp_path: Path) -> str:
    return database_url(tmp_path)


def tables(url: str) -> set[str]:
    db = Database(url)
    found = set(sa.inspect(db.engine).get_table_names())
    db.close()
    return found - {"alembic_version"}


def test_the_migrations_make_what_the_models_say(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--check"]) == 0
    assert main(["migrate", "--check", "--url", url]) == 0
    assert tables(url) == set(Base.metadata.tables)


def test_a_database_that_differs_from_the_models_is_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    migrate(url)
    db = Database(url)
    with db.write() as session:
        session.execute(sa.text("ALTER TABLE workers ADD COLUMN stray INTEGER"))
    db.close()
    assert main(["migrate", "--check", "--url", url]) == 1
    assert "stray" in capsys.readouterr().err


def test_going_down_and_up_again_works_with_rows_in_the_tables(url: str) -> None:
    migrate(url)
    db = Database(url)
    add_job(db)
    made = model()
    publish_stored(db, claim(db).lease, [artifact("metrics.json")], [made], {}, START, GRACE)
    with db.write() as session:
        catalog.point_alias(session, "live", made.id, START)
        catalog.create_key(session, "me", "admin", START)
    db.close()
    migrate(url)  # nothing to do, and nothing lost
    db = Database(url)
    with db.read() as session:
        assert len(session.scalars(sa.select(Dataset)).all()) == 1
        assert catalog.find_model(session, "live").id == made.id
    db.close()
    script = ScriptDirectory.from_config(alembic_config(url))
    for revision in script.walk_revisions():
        command.downgrade(alembic_config(url), "-1")
        command.upgrade(alembic_config(url), revision.revision)
        command.downgrade(alembic_config(url), "-1")
    assert tables(url) == set()
    migrate(url)
    assert tables(url) == set(Base.metadata.tables)


def fill(url: str) -> None:
    """One row in every table that has none, by the columns that it has at this revision."""
    db = Database(url)
    values = {sa.DateTime: START.replace(tzinfo=None), sa.JSON: {"a": ["ü"]}, sa.Boolean: True, sa.Integer: 1,
              sa.Float: 0.5, sa.String: "x"}  # fmt: skip
    with db.write() as session:
        for table in reflected(db).sorted_tables:
            if table.name != "alembic_version" and session.execute(sa.select(table)).first() is None:
                kinds = {column.name: next(k for k in values if isinstance(column.type, k)) for column in table.columns}
                session.execute(table.insert().values({name: values[kind] for name, kind in kinds.items()}))
    db.close()


def reflected(db: Database) -> sa.MetaData:
    found = sa.MetaData()
    found.reflect(db.engine)
    return found


def rows(url: str) -> dict[str, list[dict[str, object]]]:
    db = Database(url)
    with db.read() as session:
        found = {
            table.name: [dict(row) for row in session.execute(sa.select(table)).mappings()]
            for table in reflected(db).sorted_tables if table.name != "alembic_version"
        }  # fmt: skip
        if session.get_bind().dialect.name == "sqlite":  # which lets batches break them
            assert session.execute(sa.text("PRAGMA foreign_key_check")).all() == []
    db.close()
    return found


def same(before: dict[str, list[dict[str, object]]], after: dict[str, list[dict[str, object]]]) -> bool:
    """Whether every row of a table that is in both is what it was, in the columns that are in both."""
    return all(
        row[name] == other[name]
        for table in before.keys() & after
        for row, other in zip(before[table], after[table], strict=True)
        for name in row.keys() & other
    )


def test_each_step_up_and_down_keeps_the_rows_of_every_table_that_it_leaves(url: str) -> None:
    config = alembic_config(url)
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]
    command.upgrade(config, revisions[0])
    fill(url)
    for revision in revisions[1:]:
        before = rows(url)
        command.upgrade(config, revision)
        assert before.keys() <= rows(url).keys(), "no step up takes a table away"
        assert same(before, rows(url)), revision
        fill(url)
    assert all(len(found) == 1 for found in rows(url).values())
    assert set(rows(url)) == set(Base.metadata.tables)
    for revision in revisions[-2::-1]:
        before = rows(url)
        command.downgrade(config, revision)
        assert same(before, rows(url)), revision
        command.upgrade(config, "+1")
        assert same(before, {table: found for table, found in rows(url).items() if found}), revision
        command.downgrade(config, revision)
    assert set(rows(url)) < set(Base.metadata.tables)
    assert all(len(found) == 1 for found in rows(url).values())


def test_there_is_one_newest_revision(url: str) -> None:
    assert len(ScriptDirectory.from_config(alembic_config(url)).get_heads()) == 1


def test_a_database_of_a_newer_tuneproof_is_refused_and_left_alone(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate(url)
    db = Database(url)
    with db.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    db.close()
    with pytest.raises(RuntimeError, match="newer tuneproof"):
        migrate(url)
    monkeypatch.setenv("TUNEPROOF_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TUNEPROOF_DATABASE_URL", url)
    assert main(["migrate"]) == 2
    assert "Install that version" in capsys.readouterr().err
    for refused in (["serve", "--port", "0"], ["keys", "list"], ["keys", "create", "--name", "a", "--scope", "read"]):
        assert main(refused) == 2
        said = capsys.readouterr()
        assert ("Install that version" in said.err, said.out) == (True, ""), refused
    assert main(["doctor", "--json"]) in (0, 1)
    [found] = [line for line in json.loads(capsys.readouterr().out) if line["about"] == "database"]
    assert found["level"] == "warn"
    assert "is at revision 9999; this version needs" in found["found"]
    assert "if a newer tuneproof wrote it, install that one" in found["todo"]
    assert worker() == 2
    assert "Install that version" in capsys.readouterr().err
    assert tables(url) == set(Base.metadata.tables)
    assert {table for table, found in rows(url).items() if found} == set(), "not even a key was made"


def test_processes_that_migrate_at_once_take_turns(url: str) -> None:
    program = "import sys; from service.db.engine import migrate; migrate(sys.argv[1])"
    racing = [subprocess.Popen([sys.executable, "-c", program, url], stderr=subprocess.PIPE) for _ in range(3)]
    for process in racing:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    assert tables(url) == set(Base.metadata.tables)


@sqlite_only
def test_odd_characters_in_the_path_are_no_trouble(tmp_path: Path) -> None:
    folder = tmp_path / "100% new folder, ünïcödé"
    url = database_url(folder)
    migrate(url)
    assert tables(url) == set(Base.metadata.tables)
