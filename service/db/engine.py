"""Connections, transactions and migrations."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event, make_url
from sqlalchemy.orm import Session

from service.core.errors import NotFound

BUSY_TIMEOUT_SECONDS = 30
Row = TypeVar("Row")


class Database:
    """A database by URL. `read` and `write` are the only ways to a session."""

    writes = 0
    """How many this process has made: whoever remembers what was read looks again once it has grown."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Parameters hold users' texts; they must not stand in an error's message.
        self.engine = create_engine(url, hide_parameters=True, pool_pre_ping=True)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _sqlite_pragmas)
            event.listen(self.engine, "begin", _sqlite_begin)
        self._writing = self.engine.execution_options(writes=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database and changes nothing."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction: committed where the block ends, rolled back where it raises."""
        try:
            with Session(self._writing, expire_on_commit=False) as session, session.begin():
                yield session
        finally:
            self.writes += 1

    def close(self) -> None:
        self.engine.dispose()


def existing(row: Row | None, otherwise: str) -> Row:
    """The row that was looked for. Raises NotFound, with these words, where there is none."""
    if row is None:
        raise NotFound(otherwise)
    return row


def migrate(url: str) -> None:
    """Brings the database to the newest revision; processes that start together take turns.

    Raises:
        RuntimeError: the database is newer than this code.
    """
    from alembic import command
    from alembic.script.revision import ResolutionError
    from alembic.util import CommandError

    with _one_at_a_time(url):
        try:
            command.upgrade(alembic_config(url), "head")
        except CommandError as error:
            if isinstance(error.__cause__, ResolutionError):
                raise RuntimeError(
                    "The database was written by a newer tuneproof than this one. Install that version, or restore a "
                    "backup made before the upgrade."
                ) from error
            raise


def revisions(connection: Connection) -> tuple[str | None, str | None]:
    """The database's revision, None where it has no tables yet, and the one that this version works with."""
    from alembic.runtime.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision(), _newest_revision()


@cache
def _newest_revision() -> str | None:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(alembic_config("sqlite://")).get_current_head()


def alembic_config(url: str):  # type: ignore[no-untyped-def]
    """Alembic's configuration; the migrations lie beside this package in a wheel, and at the top of a checkout."""
    from alembic.config import Config

    packaged = Path(__file__).parent / "migrations"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


@contextmanager
def _one_at_a_time(url: str) -> Iterator[None]:
    file = make_url(url).database
    if not url.startswith("sqlite") or not file or file == ":memory:":
        yield
        return
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails at once, whatever the timeout, if another wrote between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
