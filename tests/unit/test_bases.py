"""The bases that an engine process holds: loaded one at a time, within their memory, and refused in words."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.core.errors import BaseLoading, BaseNotServed
from service.inference import bases as module
from service.inference.bases import Bases, Limits

A, B = ("a", "r1"), ("b", "r1")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each load waits for `go`. A base has 100 bytes; the one called `broken` cannot be loaded."""
    world = SimpleNamespace(go=threading.Event(), at_once=0, most_at_once=0, names=[])

    def backbone(source: Any, **_given: Any) -> Any:
        world.at_once += 1
        world.most_at_once = max(world.most_at_once, world.at_once)
        assert world.go.wait(20)
        world.at_once -= 1
        world.names.append(source.name)
        if source.name == "broken":
            raise OSError("/secret/path is damaged")
        return SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([torch.zeros(25)])))

    located: Callable[..., Any] = lambda name, _revision, _folder: SimpleNamespace(name=name, size_bytes=100)  # noqa: E731
    monkeypatch.setattr(module, "locate_at", located)
    monkeypatch.setattr(module, "load_backbone", backbone)
    monkeypatch.setattr(module, "Engine", lambda backbone: SimpleNamespace(backbone=backbone))
    return world


def held(limit: int) -> Bases:
    return Bases(None, Limits("cpu", "fp32", limit, 1))


def test_two_bases_asked_for_at_once_are_loaded_one_after_the_other_and_both_are_held(loads: Any) -> None:
    bases = held(400)
    both = [bases.load(A), bases.load(B)]
    with pytest.raises(BaseLoading):
        bases.engine(A)
    loads.go.set()
    assert [loading.result(20) for loading in both] == [bases.engine(A), bases.engine(B)]
    assert (loads.most_at_once, sorted(loads.names)) == (1, ["a", "b"])


def test_the_base_that_was_used_least_recently_makes_room(loads: Any) -> None:
    bases = held(150)
    loads.go.set()
    first = bases.load(A).result(20)
    bases.load(B).result(20)
    with pytest.raises(BaseLoading):
        bases.engine(A)
    assert bases.load(A).result(20) is not first
    assert loads.names == ["a", "b", "a"]


@pytest.mark.parametrize(("name", "limit", "said"), [("broken", 400, "OSError"), ("a", 99, "TUNEPROOF_SERVE_MEMORY")])
def test_a_base_that_cannot_be_had_is_refused_in_words_and_not_tried_at_every_call(
    loads: Any, name: str, limit: int, said: str
) -> None:
    bases = held(limit)
    loads.go.set()
    for _ in range(2):
        with pytest.raises(BaseNotServed, match=said) as refused:
            bases.load((name, "r1")).result(20)
        assert "/secret" not in refused.value.detail
    assert len(loads.names) <= 1
