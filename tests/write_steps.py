"""Every write on the way to a published row, one by one: to be counted, looked at, and broken."""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from service.db import engine

Fault = Literal["died", "disk error", "disk full"]
_ERRORS = {
    "disk error": (errno.EIO, "SQLITE_IOERR", "disk I/O error"),
    "disk full": (errno.ENOSPC, "SQLITE_FULL", "database or disk is full"),
}


class Died(BaseException):
    """The process is gone. Whatever handles this on the way can write and delete nothing any more."""


class WriteSteps:
    """Folders, files, fsyncs below `root`, and the rows and commits of every SQLite database.

    While it is `on`, the step of number `at` breaks. A disk error is over after it; from a full disk on, and for one
    that died, no write succeeds until it is off again. Both sides of a commit are steps: its word may be lost.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self.names, self.at = str(root), list[str](), 0
        self.fault: Fault = "died"
        self.look: Callable[[], object] = lambda: None
        self._on = self._broken = False
        self._patch(monkeypatch)

    @contextlib.contextmanager
    def on(self, fault: Fault = "died", at: int = 0) -> Iterator[None]:
        """Breaks the step of that number, from 1; none at 0."""
        self.fault, self.at, self._on, self._broken, self.names = fault, at, True, False, []
        try:
            yield
        finally:
            self._on = False

    def __str__(self) -> str:
        return f"step {self.at}, {self.names[min(self.at, len(self.names)) - 1]}"

    @property
    def struck(self) -> bool:
        return self._broken

    def _step(self, name: str, *, of_database: bool = False) -> None:
        if not self._on:
            return
        self.names.append(name)
        self.look()
        first = len(self.names) == self.at
        self._broken = self._broken or first
        if first or (self._broken and self.fault != "disk error"):
            self._break(of_database)

    def _break(self, of_database: bool) -> None:
        if self.fault == "died":
            raise Died
        number, sqlite_name, message = _ERRORS[self.fault]
        if of_database:
            error = sqlite3.OperationalError(message)
            error.sqlite_errorname = sqlite_name
            raise error
        raise OSError(number, os.strerror(number))

    def _below(self, path: Any) -> bool:
        return str(path).startswith(self.root)

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mkdir, rm = os.mkdir, LocalFileSystem.rm
        open_, write = LocalFileOpener._open, LocalFileOpener.write
        execute, many = SQLiteDialect_pysqlite.do_execute, SQLiteDialect_pysqlite.do_executemany
        commit, pragmas = SQLiteDialect_pysqlite.do_commit, engine._sqlite_pragmas

        def unsynced(_handle: int) -> None:
            """No power is cut here, and waiting for the disk is most of the time otherwise."""

        def without_waiting(connection: Any, record: Any) -> None:
            pragmas(connection, record)
            connection.execute("PRAGMA synchronous=OFF").close()

        def stepped(real: Any, name: str, of_which: Callable[..., Any]) -> Callable[..., Any]:
            def call(first: Any, *rest: Any, **named: Any) -> Any:
                if self._below(path := of_which(first)):
                    self._step(f"{name} {path}")
                return real(first, *rest, **named)

            return call

        def removed(fs: LocalFileSystem, path: Any, **given: Any) -> None:
            if self._on and self._broken and self.fault == "died":
                raise Died
            rm(fs, path, **given)

        def executed(real: Any) -> Callable[..., Any]:
            def call(dialect: Any, cursor: Any, statement: str, *rest: Any) -> Any:
                if statement.startswith(("INSERT", "UPDATE", "DELETE")):
                    self._step(statement[:40], of_database=True)
                return real(dialect, cursor, statement, *rest)

            return call

        def committed(dialect: Any, connection: Any) -> None:
            self._step("commit", of_database=True)
            commit(dialect, connection)
            self._step("after the commit", of_database=True)

        monkeypatch.setattr(engine, "_sqlite_pragmas", without_waiting)
        monkeypatch.setattr(os, "mkdir", stepped(mkdir, "mkdir", str))
        monkeypatch.setattr(os, "fsync", stepped(unsynced, "fsync", lambda fd: Path(f"/proc/self/fd/{fd}").readlink()))
        monkeypatch.setattr(LocalFileSystem, "rm", removed)
        writes = lambda file: file.path if "w" in file.mode else ""  # noqa: E731
        monkeypatch.setattr(LocalFileOpener, "_open", stepped(open_, "open", writes))
        monkeypatch.setattr(LocalFileOpener, "write", stepped(write, "write", writes))
        monkeypatch.setattr(SQLiteDialect_pysqlite, "do_execute", executed(execute))
        monkeypatch.setattr(SQLiteDialect_pysqlite, "do_executemany", executed(many))
        monkeypatch.setattr(SQLiteDialect_pysqlite, "do_commit", committed)


class PowerCut:
    """What a disk is sure to hold below `root`: the files as they were when they were synced, in folders that were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self._files, self._names = root, dict[Path, bytes](), dict[Path, set[str]]()
        real = os.fsync

        def fsync(handle: int) -> None:
            real(handle)
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if path.is_dir():
                self._names[path] = {child.name for child in path.iterdir()}
            else:
                self._files[path] = path.read_bytes()

        monkeypatch.setattr(os, "fsync", fsync)

    def keeps(self, path: Path) -> bool:
        """Whether it is there after a power cut now, and as it is now."""
        inside = [path, *path.parents]
        above = inside[1 : inside.index(self.root) + 1]
        named = all(child.name in self._names.get(folder, ()) for child, folder in zip(inside, above, strict=False))
        return named and self._files.get(path) == path.read_bytes()
