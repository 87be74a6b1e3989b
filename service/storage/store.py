"""Artifacts on fsspec. A key is written once and never overwritten; nothing is visible before a row names it."""

import asyncio
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

from service.core.errors import StorageUnavailable

_CHUNK = 1 << 20
# Of the clients that keep listings and read far ahead: others write too, and most files are smaller than that.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False, "default_block_size": 8 << 20, "skip_instance_cache": True,
        # `read_timeout` is of silence, after all of a part was sent. s3fs alone tries again: tries multiply, and a host
        # that takes connections and says nothing would take minutes by botocore's own.
        # Links are signed by version 2 unless told, which new buckets of Amazon's refuse.
        "config_kwargs": {
            "connect_timeout": 3, "read_timeout": 10, "retries": {"max_attempts": 0}, "signature_version": "s3v4",
        },
    },
}  # fmt: skip
_TRIES, _CALL_SECONDS = 2, 30.0
_ROUNDS = 10  # of deleting what is still there
_CLIENTS = {"botocore", "aiohttp", "fsspec"}
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
    """A folder or bucket, by fsspec URL.

    Raises RuntimeError where the URL's client is not installed. Whatever reads or writes raises StorageUnavailable, an
    OSError, while an object store does not answer.
    """

    def __init__(self, url: str) -> None:
        try:
            fs, root = fsspec.url_to_fs(url, **_OPTIONS.get(url.partition("://")[0], {}))
        except ImportError as error:
            raise RuntimeError(f"TUNEPROOF_STORAGE_URL: {error}. For s3://: pip install 'tuneproof[s3]'.") from error
        except ValueError as error:
            raise RuntimeError(f"TUNEPROOF_STORAGE_URL: {error}. Take s3://bucket/prefix or file:///folder.") from error
        if "s3" in fs.protocol:
            _bound(fs)
        self._fs: Any = fs
        self._root: str = root.rstrip("/")
        self._local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))

    def put(self, source: IO[bytes], key: str) -> Stored:
        """Copies a stream to a new key; when this returns, the bytes are on the disk or in the bucket, verified.

        Where it fails, nothing is left, unless the store is away. Raises FileExistsError where an object store has
        other bytes under that key.
        """
        path = self._path(key)
        try:
            with _reaching():
                return self._write(source, path, key)
        except (FileExistsError, StorageUnavailable):  # a store that is away can delete nothing, and is not waited for
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                self.delete(key)
            raise

    def open(self, key: str) -> IO[bytes]:
        with _reaching():
            stream: IO[bytes] = self._fs.open(self._path(key), "rb")
        return stream

    def chunks(self, key: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` on, `size` of them or all. Raises FileNotFoundError here, not on the way."""
        return self._read(self.open(key), start, size)

    def _read(self, opened: IO[bytes], start: int, size: int | None) -> Iterator[bytes]:
        with _reaching(), opened as stream:
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
            with _reaching():  # side by side: a model is some five small files and a larger one
                wanted = {self._path(f"{prefix}/{name}"): f"{copies}/{name}" for name in names}
                self._fs.get(list(wanted), list(wanted.values()))
            yield Path(copies)

    def fetch_folder(self, prefix: str, target: Path) -> None:
        """Copies every file under `prefix` out."""
        root = self._path(prefix)
        with _reaching():
            found = self._fs.find(root)
        for path in found:
            name = path[len(root) :].lstrip("/")
            self.fetch(f"{prefix}/{name}", target / name)

    def delete(self, prefix: str) -> None:
        """Deletes a key or everything below it; what is not there is no error."""
        path = self._path(prefix)
        with _reaching():
            for _ in range(_ROUNDS):  # where somebody else deletes it too, `rm` stops at what is gone already
                if not self._fs.exists(path):
                    return
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(path, recursive=True)
        # s3fs does not say what a store refuses to delete.
        raise PermissionError(f"{prefix} is still there: deleting takes s3:DeleteObject, or the folder's permissions")

    def link(self, key: str, seconds: int, **answered: str) -> str | None:
        """A URL that gives this file to whoever has it, for so long; None where the storage signs none.

        `answered` are headers that the store is to answer with, by S3's names (`ResponseContentType`).
        """
        if not hasattr(self._fs, "url"):
            return None
        with _reaching():
            return str(self._fs.url(self._path(key), expires=seconds, **answered))

    def probe(self) -> None:
        """Raises OSError where the storage cannot be reached."""
        if self._local:
            Path(self._root).mkdir(parents=True, exist_ok=True)
        with _reaching():
            try:
                self._fs.ls(self._root)
            except FileNotFoundError:  # an object store knows no empty folder, but a bucket is there or not
                if "s3" in self._fs.protocol and not self._fs.exists(self._root.partition("/")[0]):
                    raise

    def _write(self, source: IO[bytes], path: str, key: str) -> Stored:
        if self._local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        try:
            with self._new(path) as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
                if self._local:
                    target.flush()
                    os.fsync(target.fileno())
        except FileExistsError:
            # A client that lost the answer sends again, and finds its own bytes there.
            with self.open(key) as there:
                if hashlib.file_digest(there, "sha256").digest() != digest.digest():  # type: ignore[arg-type]
                    raise
        if self._local:
            _sync_folders(Path(path).parent, Path(self._root))
        elif self._fs.info(path)["size"] != size:
            raise OSError(f"{key} was not stored whole")
        return Stored(key, size, digest.hexdigest())

    @contextlib.contextmanager
    def _new(self, path: str) -> Iterator[Any]:
        """A file to be written; in an object store it appears whole, in nothing's place, or not at all."""
        if self._local:
            with self._fs.open(path, "wb") as target:
                yield target
            return
        target = self._fs.open(path, "xb")
        try:
            yield target
            target.close()
        except BaseException:
            target.forced = True  # for fsspec's `close`, which would store what there is so far
            target.discard()
            raise

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key) or not {".", ".."}.isdisjoint(key.split("/")):
            raise ValueError("not a storage key")
        return f"{self._root}/{key}"


def _bound(fs: Any) -> None:
    """Has s3fs give up in time. Where it waits to send (`Expect: 100-continue`), no timeout of the client counts."""
    from fsspec.asyn import sync_wrapper
    from s3fs.core import set_custom_error_handler  # type: ignore[import-untyped]

    set_custom_error_handler(_is_away)  # what is tried again, besides timeouts
    fs.retries, call = _TRIES, fs._call_s3

    async def call_in_time(*given: Any, **named: Any) -> Any:
        async with asyncio.timeout(_CALL_SECONDS):
            return await call(*given, **named)

    fs._call_s3, fs.call_s3 = call_in_time, sync_wrapper(call_in_time, obj=fs)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """What the clients of object stores raise of their own, as the one error that callers know."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise PermissionError(f"{error}. The storage needs keys of its own: docs/several-machines.md.") from error
        if _is_away(error) or not _CLIENTS.isdisjoint(
            kind.__module__.partition(".")[0] for kind in type(error).__mro__
        ):
            raise StorageUnavailable("The storage does not answer. Ask again in a moment.") from error
        raise


def _is_away(error: Exception) -> bool:
    """Whether the store says so itself: s3fs makes a plain OSError of that, and of every other answer."""
    answer = getattr(error.__cause__ or error, "response", None) or {}
    status, code = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), answer.get("Error", {}).get("Code")
    away = status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout")
    return away or isinstance(error, TimeoutError | ConnectionError)


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
