"""Artifacts on fsspec. A key is written once and never overwritten; nothing is visible before a row names it."""

import contextlib
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import fsspec

_CHUNK = 1 << 20
_KEY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True)
class Stored:
    """A file as it lies in the storage."""

    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredText:
    """A stored file that is opened as a `Path` would be, and read as it comes: nothing is copied first."""

    storage: "Storage"
    key: str

    def open(self, *, encoding: str, errors: str, newline: str) -> TextIO:
        return io.TextIOWrapper(self.storage.open(self.key), encoding, errors, newline)


class Storage:
    """A folder or bucket, by fsspec URL."""

    def __init__(self, url: str) -> None:
        fs, root = fsspec.url_to_fs(url)
        self._fs: Any = fs
        self._root: str = root.rstrip("/")
        self._local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))

    def put(self, source: IO[bytes], key: str) -> Stored:
        """Copies a stream to a new key; when this returns, the bytes are on the disk or in the bucket, verified.

        Where it fails, nothing is left.
        """
        path = self._path(key)
        try:
            return self._write(source, path, key)
        except BaseException:
            with contextlib.suppress(OSError):
                self.delete(key)
            raise

    def open(self, key: str) -> IO[bytes]:
        stream: IO[bytes] = self._fs.open(self._path(key), "rb")
        return stream

    def chunks(self, key: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` on, `size` of them or all. Raises FileNotFoundError here, not on the way."""
        return self._read(self.open(key), start, size)

    def _read(self, opened: IO[bytes], start: int, size: int | None) -> Iterator[bytes]:
        with opened as stream:
            stream.seek(start)
            left = size
            while left is None or left > 0:
                chunk = stream.read(_CHUNK if left is None else min(_CHUNK, left))
                if not chunk:
                    return
                left = None if left is None else left - len(chunk)
                yield chunk

    def fetch(self, key: str, target: Path) -> None:
        """Copies one file out."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for chunk in self.chunks(key):
                file.write(chunk)

    @contextlib.contextmanager
    def folder(self, prefix: str, names: Iterable[str]) -> Iterator[Path]:
        """Files below `prefix` to be read from a folder: where they lie, or copies of them from an object store."""
        if self._local:
            yield Path(self._path(prefix))
            return
        with tempfile.TemporaryDirectory(prefix="tuneproof-") as copies:
            for name in names:
                self.fetch(f"{prefix}/{name}", Path(copies) / name)
            yield Path(copies)

    def fetch_folder(self, prefix: str, target: Path) -> None:
        """Copies every file under `prefix` out."""
        root = self._path(prefix)
        for path in self._fs.find(root):
            name = path[len(root) :].lstrip("/")
            self.fetch(f"{prefix}/{name}", target / name)

    def delete(self, prefix: str) -> None:
        """Deletes a key or everything below it; what is not there is no error."""
        path = self._path(prefix)
        while self._fs.exists(path):  # where somebody else deletes it too, `rm` stops at what is gone already
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(path, recursive=True)

    def probe(self) -> None:
        """Raises OSError where the storage cannot be reached."""
        if self._local:
            Path(self._root).mkdir(parents=True, exist_ok=True)
        # An object store knows no empty folder: one that answers so can be reached.
        with contextlib.suppress(FileNotFoundError):
            self._fs.ls(self._root)

    def _write(self, source: IO[bytes], path: str, key: str) -> Stored:
        if self._local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with self._fs.open(path, "wb") as target:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                target.write(chunk)
            if self._local:
                target.flush()
                os.fsync(target.fileno())
        if self._local:
            _sync_folders(Path(path).parent, Path(self._root))
        elif self._fs.info(path)["size"] != size:
            raise OSError(f"{key} was not stored whole")
        return Stored(key, size, digest.hexdigest())

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key) or not {".", ".."}.isdisjoint(key.split("/")):
            raise ValueError("not a storage key")
        return f"{self._root}/{key}"


def _sync_folders(folder: Path, root: Path) -> None:
    """A new name is on the disk only once its folder is, and so on up."""
    for above in (folder, *folder.parents):
        try:
            handle = os.open(above, os.O_RDONLY)
        except PermissionError:
            if above != root.parent:  # which is not ours, and may be anybody's
                raise
            return
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if above == root.parent:
            return
