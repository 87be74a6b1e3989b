"""The adapter cache over a real storage: shared loads, room by bytes, and nothing kept of what could not be had."""

import io
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.core.errors import EngineUnavailable, InvalidData
from service.inference import adapters as cache
from service.inference.adapters import Adapters
from service.inference.wire import Figures, ServedModel
from service.storage import Storage
from tests.waiting import until


class Base:
    """Stands for an engine: the cache hands its backbone on and holds it weakly."""

    def __init__(self) -> None:
        parameters = lambda: iter([SimpleNamespace(dtype="fp32")])  # noqa: E731
        self.backbone = SimpleNamespace(model=SimpleNamespace(parameters=parameters), head_name="h", device="cpu")


@dataclass(eq=False)
class Read:
    """Stands for an adapter."""

    name: str
    size_bytes: int = 10


def served(name: str) -> ServedModel:
    return ServedModel(name, "tiny", "r", f"models/{name}", ("manifest.json",))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Each load waits for `go`; `seen` names the folders. A folder named `bad` is damaged."""
    world: dict[str, Any] = {"go": threading.Event(), "seen": [], "begun": 0}

    def load(folder: Path, **_given: Any) -> Any:
        world["begun"] += 1
        assert world["go"].wait(20)
        world["seen"].append(folder.name)
        world["files"] = {path.name for path in folder.iterdir()} if folder.exists() else set()
        world["threads"] = torch.get_num_threads()
        world["nice"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        if folder.name == "bad":
            raise InvalidData("not the published file")
        return Read(folder.name)

    monkeypatch.setattr(cache, "load_adapter", load)
    yield world
    world["go"].set()


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """Of this thread's products."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def test_a_loader_takes_one_core_and_leaves_the_engines_threads_as_they_are(
    tmp_path: Path, reads: dict[str, Any], threads: int
) -> None:
    reads["go"].set()
    held = Adapters(Storage(f"file://{tmp_path}"), 100, Figures())
    held.get(served("a"), Base()).result(20)  # type: ignore[arg-type]
    assert reads["threads"] == 1
    if sys.platform == "linux":
        assert reads["nice"] == 10 > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert torch.get_num_threads() == threads == 3


def test_from_an_object_store_only_what_a_prediction_takes_is_fetched(bucket: str, reads: dict[str, Any]) -> None:
    reads["go"].set()
    storage, files = Storage(f"s3://{bucket}/cache"), ("adapter_model.safetensors", "manifest.json", "tokenizer.json")
    for name in files:
        storage.put(io.BytesIO(b"{}"), f"models/a/{name}")
    asked = ServedModel("a", "tiny", "r", "models/a", files)
    Adapters(storage, 100, Figures()).get(asked, Base()).result(20)  # type: ignore[arg-type]
    assert reads["files"] == {"adapter_model.safetensors", "manifest.json"}


def test_calls_that_wait_for_one_adapter_share_its_load(tmp_path: Path, reads: dict[str, Any]) -> None:
    held, base = Adapters(Storage(f"file://{tmp_path}"), 100, figures := Figures()), Base()
    waiting = [held.get(served("a"), base) for _ in range(5)]  # type: ignore[arg-type]
    reads["go"].set()
    assert len({id(adapter.result(20)) for adapter in waiting}) == 1
    assert held.get(served("a"), base).result(20) is waiting[0].result()  # type: ignore[arg-type]
    assert reads["seen"] == ["a"]
    assert (figures.adapter_hits, figures.adapter_misses, figures.adapter_bytes) == (1, 5, 10)


def test_the_least_recently_used_makes_room_and_lives_on_where_it_is_in_use(
    tmp_path: Path, reads: dict[str, Any]
) -> None:
    reads["go"].set()
    held, base = Adapters(Storage(f"file://{tmp_path}"), 30, figures := Figures()), Base()

    def get(name: str) -> Any:
        return held.get(served(name), base).result(20)  # type: ignore[arg-type]

    first = get("a")
    for name in ("b", "c", "a", "d"):
        get(name)
        assert figures.adapter_bytes <= 30
    assert figures.adapter_evictions == 1
    assert get("a") is first
    reads["seen"].clear()
    get("b")
    assert reads["seen"] == ["b"], "b was out, the others are there"
    assert first.name == "a"


def test_nothing_is_read_while_what_calls_still_use_takes_all_the_room(tmp_path: Path, reads: dict[str, Any]) -> None:
    held, base = Adapters(Storage(f"file://{tmp_path}"), 10, figures := Figures()), Base()
    reads["go"].set()
    in_use = [held.get(served(name), base).result(20) for name in ("a", "b")]  # type: ignore[arg-type]
    assert figures.adapter_evictions == 1, "a is out of the cache, and a call is still answered with it"
    third = held.get(served("c"), base)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        third.result(0.2)
    assert reads["seen"] == ["a", "b"]
    del in_use[0]
    assert third.result(20).name == "c"
    assert (figures.adapter_bytes, figures.adapter_evictions) == (10, 2)


def test_one_larger_than_the_limit_makes_room_for_the_next_even_if_it_was_used_after_that_was_asked_for(
    tmp_path: Path, reads: dict[str, Any]
) -> None:
    held, base = Adapters(Storage(f"file://{tmp_path}"), 5, figures := Figures()), Base()
    reads["go"].set()
    held.get(served("a"), base).result(20)  # type: ignore[arg-type]
    reads["go"].clear()
    second = held.get(served("b"), base)  # type: ignore[arg-type]
    held.get(served("a"), base)  # type: ignore[arg-type]
    reads["go"].set()
    assert second.result(20).name == "b"
    assert figures.adapter_bytes == 10


def test_one_larger_than_the_limit_that_comes_while_another_waits_makes_room_for_it_too(
    tmp_path: Path, reads: dict[str, Any]
) -> None:
    held, base = Adapters(Storage(f"file://{tmp_path}"), 5, Figures()), Base()
    both = [held.get(served(name), base) for name in ("b", "c")]  # type: ignore[arg-type]
    until(lambda: reads["begun"] == 2, 20, "both are being read")
    reads["go"].set()
    in_use = [both[0].result(20)]
    both[1].result(20)
    both.clear()
    third = held.get(served("d"), base)  # type: ignore[arg-type]
    in_use.clear()
    assert third.result(20).name == "d"


def test_storage_that_cannot_be_read_at_the_moment_may_be_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_file: Path, **_given: Any) -> str:
        raise TimeoutError("the disk does not answer")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(EngineUnavailable):
        Adapters(Storage(f"file://{tmp_path}"), 30, Figures()).get(served("a"), Base()).result(20)  # type: ignore[arg-type]


def test_one_that_could_not_be_had_is_asked_for_again(tmp_path: Path, reads: dict[str, Any]) -> None:
    reads["go"].set()
    held, base = Adapters(Storage(f"file://{tmp_path}"), 30, figures := Figures()), Base()
    for _ in range(2):
        with pytest.raises(InvalidData):
            held.get(served("bad"), base).result(20)  # type: ignore[arg-type]
    assert reads["seen"] == ["bad", "bad"]
    assert figures.adapter_bytes == 0


def test_a_base_that_was_loaded_again_gets_adapters_of_its_own(tmp_path: Path, reads: dict[str, Any]) -> None:
    reads["go"].set()
    held, old, new = Adapters(Storage(f"file://{tmp_path}"), 30, figures := Figures()), Base(), Base()
    before = held.get(served("a"), old).result(20)  # type: ignore[arg-type]
    assert held.get(served("a"), new).result(20) is not before  # type: ignore[arg-type]
    assert figures.adapter_bytes == 10


def test_files_of_an_object_store_are_copied_for_the_load_alone(reads: dict[str, Any]) -> None:
    reads["go"].set()
    storage = Storage("memory://tuneproof-cache")
    with storage._fs.open("/tuneproof-cache/models/a/manifest.json", "wb") as file:
        file.write(b"{}")
    with storage.folder("models/a", ["manifest.json"]) as folder:
        assert (folder / "manifest.json").read_bytes() == b"{}"
    assert not folder.exists()
    missing = Adapters(storage, 30, Figures()).get(served("b"), Base())  # type: ignore[arg-type]
    with pytest.raises(InvalidData, match="missing"):
        missing.result(20)
