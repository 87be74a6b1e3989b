"""Bytes in and out, by keys that are ours alone, in a folder and in memory."""

import hashlib
import io
import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.storage import Storage
from tests.storing import put_folder

BYTES = bytes(range(256)) * 10


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
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


def test_a_key_that_is_gone_is_told_before_the_first_byte_is_asked_for(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.chunks("jobs/1/a")
