"""From an empty database to the newest one and back, with rows in it, and by two processes at once."""

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
from tests.rows import GRACE, START, add_job, artifact, claim, model, publish_stored
from worker.__main__ import main as worker


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tuneproof.db'}"


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
    assert main(["migrate"]) == 2
    assert "Install that version" in capsys.readouterr().err
    monkeypatch.setenv("TUNEPROOF_DATABASE_URL", url)
    assert worker() == 2
    assert "Install that version" in capsys.readouterr().err
    assert tables(url) == set(Base.metadata.tables)


def test_processes_that_migrate_at_once_take_turns(url: str) -> None:
    program = "import sys; from service.db.engine import migrate; migrate(sys.argv[1])"
    racing = [subprocess.Popen([sys.executable, "-c", program, url], stderr=subprocess.PIPE) for _ in range(3)]
    for process in racing:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    assert tables(url) == set(Base.metadata.tables)


def test_odd_characters_in_the_path_are_no_trouble(tmp_path: Path) -> None:
    folder = tmp_path / "100% new folder, ünïcödé"
    url = f"sqlite:///{folder / 'tuneproof.db'}"
    migrate(url)
    assert tables(url) == set(Base.metadata.tables)
