"""Connections, transactions and migrations."""

import fcntl
import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.orm import Session

from service.core.errors import NotFound
from service.core.settings import APART, TOGETHER, Settings

BUSY_TIMEOUT_SECONDS = 30
# The server is a standby now, or had enough of waiting for us: the statement may do on a new connection.
_LEFT = {"25006", "25P03"}
# A host that vanishes says nothing; without these the kernel waits a quarter of an hour, or two where it is idle.
_LIMITS = {
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}  # fmt: skip
_MIGRATING = 0x74756E65  # PostgreSQL's advisory locks go by number
Row = TypeVar("Row")


class Database:
    """SQLite or PostgreSQL, by URL. `read` and `write` are the only ways to a session.

    Raises RuntimeError where the URL's driver is not installed, or is for another database.
    """

    writes = 0
    """How many this process has made: whoever remembers what was read looks again once it has grown."""

    def __init__(self, url: str, connections: int = 15) -> None:
        self.url = url
        self.engine = engine_of(url, connections)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _sqlite_pragmas)
            event.listen(self.engine, "begin", _sqlite_begin)
            self._reading = self.engine
        else:
            event.listen(self.engine, "connect", _postgresql_limits)
            event.listen(self.engine, "handle_error", _leave)
            self._reading = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._writing = self.engine.execution_options(writes=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database and changes nothing."""
        with Session(self._reading, expire_on_commit=False) as session:
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


def engine_of(url: str, connections: int = 15) -> Engine:
    """An engine with at most so many connections. Raises RuntimeError, as `Database` does."""
    found = with_driver(url)
    server = found.get_backend_name() == "postgresql"
    limits = {name: value for name, value in _LIMITS.items() if name not in found.query} if server else {}
    try:
        # Parameters hold users' texts; they must not stand in an error's message.
        engine = create_engine(
            found, hide_parameters=True, pool_pre_ping=True, pool_timeout=BUSY_TIMEOUT_SECONDS, connect_args=limits,
            **({"pool_size": connections, "max_overflow": 0} if server or found.database else {}),
        )  # fmt: skip
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"TUNEPROOF_DATABASE_URL needs {error.name}: pip install 'tuneproof[postgres]' brings it."
        ) from error
    if server:
        event.listen(engine, "connect", _refuse_other_encodings, insert=True)  # before SQLAlchemy's own questions
    return engine


def with_driver(url: str) -> URL:
    """The URL, with the driver that is ours where it names none. Raises RuntimeError for databases we do not know."""
    try:
        found = make_url(url)
    except ArgumentError:
        raise RuntimeError(
            "TUNEPROOF_DATABASE_URL is no database URL. One looks like postgresql://user:password@host/tuneproof."
        ) from None
    if found.drivername in ("postgres", "postgresql"):
        return found.set(drivername="postgresql+psycopg")
    if found.get_backend_name() not in ("sqlite", "postgresql"):
        raise RuntimeError(
            f"TUNEPROOF_DATABASE_URL: {found.get_backend_name()} is not supported. Take postgresql://user:password@host/"
            "tuneproof, or leave it empty for SQLite in the data folder."
        )
    return found


def stores(settings: Settings) -> str:
    """For the log as a process starts: what it shares. Warns where others would not find its files."""
    if settings.storage_is_apart:
        logging.getLogger("tuneproof").warning("%s. %s", APART, TOGETHER)
    database = with_driver(settings.resolved_database_url).difference_update_query(("password", "sslpassword"))
    return f"database {database}; storage {re.sub('://[^/@]*@', '://***@', settings.resolved_storage_url)}"


def is_away(error: BaseException) -> bool:
    """Whether it came of a database server that is down, restarting or overrun: what was asked may do in a moment.

    A SQLite file is never away.
    """
    left = isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _LEFT
    return left or (isinstance(error, OperationalError) and not isinstance(error.orig, sqlite3.Error))


def take_turns(session: Session, name: str) -> None:
    """Until this transaction ends, nobody else gets past here with that name. SQLite's writers take turns anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})


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
    found = with_driver(url)
    file = found.database
    if found.get_backend_name() == "postgresql":
        engine = engine_of(url)
        try:
            connection = engine.connect()
        except OperationalError as error:
            raise RuntimeError(f"The database of TUNEPROOF_DATABASE_URL cannot be reached: {error.orig}") from error
        with connection:  # the lock goes with the connection, so with a process that dies
            connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": _MIGRATING})
            try:
                yield
            finally:
                connection.invalidate()
                engine.dispose()
        return
    if not file or file == ":memory:":
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


def _refuse_other_encodings(connection: Any, _record: Any) -> None:
    if (found := connection.info.parameter_status("server_encoding")) != "UTF8":
        raise RuntimeError(
            f"The database's encoding is {found}; tuneproof needs UTF8: make one with `createdb --encoding UTF8 "
            "--template template0 NAME`, and name it in TUNEPROOF_DATABASE_URL."
        )


def _postgresql_limits(connection: Any, _record: Any) -> None:
    """Nobody waits for a lock for ever, nor holds one after its process has stopped answering."""
    for name, seconds in (("lock_timeout", BUSY_TIMEOUT_SECONDS), ("idle_in_transaction_session_timeout", 300)):
        connection.execute(f"SET {name} = '{seconds}s'")
    connection.commit()


def _leave(context: ExceptionContext) -> None:
    if getattr(context.original_exception, "sqlstate", None) in _LEFT:
        context.is_disconnect = True


def _sqlite_begin(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails at once, whatever the timeout, if another wrote between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
