"""Where a test's database is: a SQLite file, or, with TEST_ON_POSTGRES=new, a real PostgreSQL."""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event

from service.db.engine import Database, migrate

# "new" until this process has started its server; then the folder of its socket.
_VARIABLE = "TEST_ON_POSTGRES"
on_postgres = _VARIABLE in os.environ
sqlite_only = pytest.mark.skipif(on_postgres, reason="is about SQLite")
_KEPT = 8  # databases that a test may still come back to
_made: list[str] = []


class Server:
    """A PostgreSQL of our own, listening on a socket in a folder alone; it stops with this process."""

    def __init__(self, **settings: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tuneproof-postgres-"))
        self._user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        self._settings = {
            "listen_addresses": "", "unix_socket_directories": str(self.folder), "max_connections": "300",
            "fsync": "off", "full_page_writes": "off",
        } | settings  # fmt: skip
        words = ["-U", "tuneproof", "-E", "UTF8", "--locale=C.UTF-8", "-A", "trust"]
        self._run("initdb", "-D", str(self.folder / "data"), *words)
        atexit.register(self.close)
        self.start()

    def start(self) -> None:
        given = " ".join(f"-c {name}={value}" for name, value in self._settings.items())
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-l", log, "-w", "-t", "60", "-o", given, "start")

    def stop(self, how: str = "fast") -> None:
        """`immediate` is as a crash."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-t", "60", "-m", how, "stop")

    def close(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [find_program(program), *arguments], user=self._user, cwd=self.folder, check=False, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(self.folder / "said").open("w"),
        )  # fmt: skip
        assert done.returncode == 0, (self.folder / "said").read_text()


def find_program(name: str) -> str:
    """Debian keeps the server's programs by version, beside the search path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    path = shutil.which(name) or (str(found[-1]) if found else None)
    if path is None:
        pytest.skip(f"no {name}: install PostgreSQL's server (Debian: postgresql)")
    return path


def address(folder: Path | str, database: str = "postgres") -> str:
    """URL of a database of the server whose socket is in that folder."""
    return f"postgresql://tuneproof@/{database}?host={folder}"


def database_url(folder: Path) -> str:
    """Of the database that belongs to a data folder; it may not be there yet."""
    if not on_postgres:
        return f"sqlite:///{folder / 'tuneproof.db'}"
    name = _name(folder)
    with _asking() as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            _create(name, "template0")
    return address(_socket(), name)


def fresh_database(folder: Path) -> Database:
    """An empty database at the newest revision: a copy of one that was migrated once."""
    if on_postgres:
        _create(_name(folder), _migrated_template())
        return Database(address(_socket(), _name(folder)))
    shutil.copyfile(_migrated_file(), folder / "tuneproof.db")
    database = Database(database_url(folder))
    # Nothing here survives a power cut anyway, and waiting for the disk is most of the time otherwise.
    event.listen(database.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF").close())
    return database


def _socket() -> str:
    """The folder of this process's server, which those that a test starts inherit."""
    if os.environ[_VARIABLE] == "new":
        os.environ[_VARIABLE] = str(Server().folder)
    return os.environ[_VARIABLE]


def _asking() -> psycopg.Connection:
    return psycopg.connect(address(_socket()), autocommit=True)


def _name(folder: Path) -> str:
    return f"t_{sha256(str(folder).encode()).hexdigest()[:24]}"


@functools.cache
def _migrated_file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tuneproof-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    migrate(f"sqlite:///{folder / 'tuneproof.db'}")
    return folder / "tuneproof.db"


@functools.cache
def _migrated_template() -> str:
    name = f"migrated_{os.getpid()}"
    _create(name, "template0")
    _made.remove(name)
    migrate(address(_socket(), name))
    return name


def _create(name: str, template: str) -> None:
    """Makes a database, in the place of what is left of those that nobody has open any more."""
    with _asking() as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        open_now = {row[0] for row in connection.execute("SELECT datname FROM pg_stat_activity")}
        for old in [old for old in _made[:-_KEPT] if old not in open_now]:  # the server waits 5 s for one that is open
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(old)))
            _made.remove(old)
        made = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(made.format(sql.Identifier(name), sql.Identifier(template)))
    if name not in _made:
        _made.append(name)
