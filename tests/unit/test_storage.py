"""Bytes in and out, by keys that are ours alone, in a folder and in memory."""

import gc
import hashlib
import io
import os
import socket
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import StorageUnavailable
from service.storage import Storage, store
from service.storage.store import _OPTIONS, _TRIES
from tests.storing import put_folder, silent_server
from tests.waiting import until
from worker.__main__ import main as worker

BYTES = bytes(range(256)) * 10


@pytest.fixture(params=["file", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return Storage(f"s3://{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}/here")
    return Storage(f"file://{tmp_path / 'storage'}" if request.param == "file" else f"memory://{uuid.uuid4().hex}/here")


def put(storage: Storage, key: str, content: bytes = BYTES) -> None:
    storage.put(io.BytesIO(content), key)


@pytest.mark.parametrize(
    "content", [b"", b"x", BYTES, os.urandom(3 * (1 << 20) + 1)], ids=["none", "one", "some", "3MiB"]
)
def test_what_was_put_comes_back_with_its_size_and_hash(storage: Storage, content: bytes) -> None:
    stored = storage.put(io.BytesIO(content), "jobs/job_1/1-t/out.bin")
    assert (stored.size_bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"".join(storage.chunks(stored.key)) == content
    with storage.open(stored.key) as stream:
        assert stream.read() == content


@pytest.mark.parametrize(
    ("start", "size"), [(0, 0), (0, 1), (5, 10), (2559, 1), (2560, 5), (9999, 5), (100, None), (0, 10**9)]
)
def test_a_range_gives_those_bytes(storage: Storage, start: int, size: int | None) -> None:
    put(storage, "a/b")
    assert b"".join(storage.chunks("a/b", start, size)) == BYTES[start : None if size is None else start + size]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "a/",
        "/a",
        "a//b",
        "..",
        "a/../b",
        "../a",
        "a/..",
        ".",
        "./a",
        "a/.",
        "a b",
        "a\\b",
        "a\n",
        "a\x00",
        "ä",
        "a%2e",
        "~",
        "a:b",
        "*",
        "a/b?c",
        "file://a",
    ],
)
def test_a_key_that_is_not_ours_is_refused(storage: Storage, key: str, tmp_path: Path) -> None:
    put(storage, "kept")
    for use in (
        lambda: put(storage, key),
        lambda: storage.open(key),
        lambda: list(storage.chunks(key)),
        lambda: storage.delete(key),
        lambda: storage.fetch(key, tmp_path / "nowhere"),
        lambda: storage.fetch_folder(key, tmp_path / "nowhere"),
    ):
        with pytest.raises(ValueError, match="not a storage key"):
            use()
    assert b"".join(storage.chunks("kept")) == BYTES


@given(st.text(max_size=30))
def test_no_key_leads_out_of_the_folder(key: str) -> None:
    storage = Storage("file:///srv/tuneproof")
    try:
        path = storage._path(key)
    except ValueError:
        return
    assert os.path.normpath(path).startswith("/srv/tuneproof/")


def test_deleting_takes_a_key_or_a_whole_prefix_and_nothing_beside_it(storage: Storage) -> None:
    for key in ("jobs/1/a", "jobs/1/sub/b", "jobs/10/a", "jobs/2"):
        put(storage, key)
    storage.delete("jobs/1")
    for gone in ("jobs/1/a", "jobs/1/sub/b"):
        with pytest.raises(FileNotFoundError):
            list(storage.chunks(gone))
    storage.delete("jobs/2")
    with pytest.raises(FileNotFoundError):
        storage.open("jobs/2")
    assert b"".join(storage.chunks("jobs/10/a")) == BYTES


def test_deleting_nothing_is_no_error(storage: Storage) -> None:
    storage.delete("jobs/none")
    put(storage, "jobs/1")
    storage.delete("jobs/1")
    storage.delete("jobs/1")


def test_a_folder_goes_in_and_comes_out_whole(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "manifest.json").write_bytes(b"{}")
    (source / "sub" / "weights.safetensors").write_bytes(BYTES)
    stored = put_folder(storage, source, "models/m")
    assert [file.key for file in stored] == ["models/m/manifest.json", "models/m/sub/weights.safetensors"]
    target = tmp_path / "target"
    storage.fetch_folder("models/m", target)
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == {"manifest.json": b"{}", "sub/weights.safetensors": BYTES}


def test_a_storage_with_nothing_in_it_yet_can_be_reached(storage: Storage) -> None:
    storage.probe()
    put(storage, "a")
    storage.probe()


def test_bytes_and_every_folder_above_them_are_on_the_disk_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", note)
    root = tmp_path / "storage"
    put(Storage(f"file://{root}"), "jobs/1/a")
    assert synced == [str(root / "jobs/1/a"), str(root / "jobs/1"), str(root / "jobs"), str(root), str(tmp_path)]


def test_a_put_that_breaks_leaves_nothing(storage: Storage) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise OSError("the upload was cut off")
            return super().read(100)

    with pytest.raises(OSError, match="cut off"):
        storage.put(Broken(BYTES), "jobs/1/a")
    with pytest.raises(FileNotFoundError):
        storage.open("jobs/1/a")


def test_what_two_delete_at_once_is_gone_when_either_returns(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recursive delete gives up at the first file that somebody else has taken."""
    for name in "abc":
        put(storage, f"jobs/1/{name}")
    real, calls = storage._fs.rm, []

    def rm(path: str, recursive: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            storage._fs.rm_file(f"{path}/b")
            raise FileNotFoundError(f"{path}/b")
        real(path, recursive=recursive)

    monkeypatch.setattr(storage._fs, "rm", rm)
    storage.delete("jobs/1")
    for name in "abc":
        with pytest.raises(FileNotFoundError):
            storage.open(f"jobs/1/{name}")


def test_what_the_store_does_not_delete_is_told(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs passes over the keys that a store refuses to delete."""
    put(storage, "jobs/1/a")
    monkeypatch.setattr(storage._fs, "rm", lambda _path, recursive: None)
    with pytest.raises(PermissionError, match="s3:DeleteObject"):
        storage.delete("jobs/1")


def test_a_key_that_is_gone_is_told_before_the_first_byte_is_asked_for(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.chunks("jobs/1/a")


# A bucket -----------------------------------------------------------------------------------------
@pytest.fixture
def s3(bucket: str) -> Any:
    """A client of somebody else's, for the same bucket."""
    return boto3.client("s3")


@pytest.fixture
def in_s3(bucket: str) -> Storage:
    return Storage(f"s3://{bucket}/{uuid.uuid4().hex}")


def test_a_large_file_goes_up_in_parts_that_the_server_checks(in_s3: Storage, s3: Any, bucket: str) -> None:
    content = os.urandom((20 << 20) + 1)
    stored = in_s3.put(io.BytesIO(content), "datasets/d/file")
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    found = s3.head_object(Bucket=bucket, Key=f"{in_s3._root.partition('/')[2]}/datasets/d/file")
    assert found["ETag"].strip('"').endswith("-3")
    assert b"".join(in_s3.chunks(stored.key)) == content
    assert b"".join(in_s3.chunks(stored.key, (16 << 20) - 5, 10)) == content[(16 << 20) - 5 : (16 << 20) + 5]


@pytest.mark.parametrize("size", [10, (20 << 20) + 1], ids=["at once", "in parts"])
def test_what_is_there_is_never_overwritten_and_the_same_bytes_once_more_are_no_error(
    in_s3: Storage, size: int
) -> None:
    first = os.urandom(size)
    put(in_s3, "jobs/1/a", first)
    with pytest.raises(FileExistsError):
        put(in_s3, "jobs/1/a", os.urandom(size))
    assert b"".join(in_s3.chunks("jobs/1/a")) == first
    put(in_s3, "jobs/1/a", first)


def test_an_upload_that_breaks_after_its_first_parts_leaves_none_of_them(in_s3: Storage, s3: Any, bucket: str) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 18 << 20:
                raise OSError("the upload was cut off")
            return super().read(size)

    with pytest.raises(OSError, match="cut off"):
        in_s3.put(Broken(bytes(20 << 20)), "datasets/d/file")
    gc.collect()
    with pytest.raises(FileNotFoundError):
        in_s3.open("datasets/d/file")
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def test_what_others_write_and_delete_is_seen_at_once(in_s3: Storage, s3: Any, bucket: str) -> None:
    root = in_s3._root.partition("/")[2]
    in_s3.delete("jobs/1")
    s3.put_object(Bucket=bucket, Key=f"{root}/jobs/1/a", Body=BYTES)
    assert b"".join(in_s3.chunks("jobs/1/a")) == BYTES
    s3.put_object(Bucket=bucket, Key=f"{root}/jobs/1/b", Body=BYTES)
    in_s3.delete("jobs/1")
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket, Prefix=root)


def test_a_link_gives_the_file_to_whoever_has_it(in_s3: Storage, storage: Storage) -> None:
    put(in_s3, "jobs/1/a")
    link = in_s3.link("jobs/1/a", 60, ResponseContentType="text/csv")
    assert link is not None
    assert "X-Amz-Signature" in link
    answer = httpx.get(link)
    assert (answer.content, answer.headers["content-type"]) == (BYTES, "text/csv")
    if "s3" not in storage._fs.protocol:
        assert storage.link("jobs/1/a", 60) is None


def test_an_object_store_that_is_away_is_told_as_such_and_a_bucket_that_is_not_there_too(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        Storage("s3://no-such-bucket/here").probe()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    away = Storage(f"s3://{bucket}/here")
    for ask in (
        lambda: put(away, "a"), lambda: away.open("a"), lambda: away.delete("a"), away.probe,
        lambda: away.fetch_folder("a", Path("/nowhere")), lambda: away.folder("a", ["b"]).__enter__(),
    ):  # fmt: skip
        with pytest.raises(StorageUnavailable) as caught:
            ask()
        assert isinstance(caught.value, OSError)


class Overrun(BaseHTTPRequestHandler):
    """Answers each request as S3 does that has no time."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return lambda: self.send_error(self.server.status)  # type: ignore[attr-defined]
        raise AttributeError(name)

    def log_message(self, *_given: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_object_store_that_says_that_it_is_away_is_believed(
    bucket: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with HTTPServer(("127.0.0.1", 0), Overrun) as server:
        server.status = status  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        away = Storage(f"s3://{bucket}/here")
        try:
            for ask in (lambda: put(away, "a"), lambda: away.open("a"), away.probe):
                with pytest.raises(StorageUnavailable):
                    ask()
        finally:
            server.shutdown()


def test_an_object_store_that_says_nothing_is_given_up_after_two_tries(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = _OPTIONS["s3"]["config_kwargs"]
    assert _TRIES * (limits["connect_timeout"] + limits["read_timeout"]) <= 30, "seconds, in the worst case"
    monkeypatch.setitem(limits, "read_timeout", 0.1)
    with silent_server() as (url, taken):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        hangs = Storage(f"s3://{bucket}/here")
        for ask in (lambda: hangs.open("a"), lambda: hangs.delete("a"), hangs.probe):
            taken.clear()
            with pytest.raises(StorageUnavailable):
                ask()
            until(lambda: len(taken) >= _TRIES, 10, "each try is a connection")
            assert len(taken) == _TRIES
        monkeypatch.setattr(store, "_CALL_SECONDS", 0.5)
        for size in (1, 9 << 20):  # sent once the host has asked for it, which is past all timeouts of sockets
            with pytest.raises(StorageUnavailable):
                put(hangs, "a", bytes(size))


def test_without_keys_nobody_waits_and_a_worker_does_not_start(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    given = {
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none",
        "TUNEPROOF_DATA_DIR": str(tmp_path), "TUNEPROOF_STORAGE_URL": f"s3://{bucket}/here",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PermissionError, match="credentials"):
        Storage(given["TUNEPROOF_STORAGE_URL"]).open("a")
    assert worker() == 2
    said = capsys.readouterr().err
    assert said.startswith("TUNEPROOF_STORAGE_URL cannot be used")
    assert "Traceback" not in said


def test_a_url_that_nothing_serves_is_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"TUNEPROOF_STORAGE_URL.*s3://bucket"):
        Storage("nothing://here")
