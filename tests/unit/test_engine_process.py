"""What happens to calls inside the engine's process, with an engine that a test holds by the hand: no torch forward."""

import io
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from service.core.errors import InvalidData
from service.inference import process, wire
from service.inference.process import EngineProcess
from service.inference.wire import Figures
from tests.waiting import until

MODEL = {"base_model": "tiny", "base_revision": "r", "storage_prefix": "models/x", "files": ["manifest.json"]}

BUDGET = 1024


class Gate:
    """An engine that scores only when it is let to, and notes each batch: `(model, text length)`."""

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(tokenizer=None)
        self.batches: list[list[tuple[str, int]]] = []
        self.open = threading.Semaphore(0)
        self.breaks: Callable[[Sequence[Any]], bool] = lambda _adapters: False
        self.error: Exception = RuntimeError("the forward broke")

    def attach(self, adapter: Any) -> None:
        pass

    def score(self, ids: Sequence[list[int]], adapters: Sequence[Any], on_batch: Any) -> list[Any]:
        self.batches.append([(adapter.name, len(row)) for row, adapter in zip(ids, adapters, strict=True)])
        assert self.open.acquire(timeout=20)
        if self.breaks(adapters):
            raise self.error
        on_batch(len(ids), len(ids))
        return [np.array([len(row), 0.0], dtype=np.float32) for row in ids]


@dataclass(eq=False)
class Adapter:
    name: str
    labels: tuple[str, ...] = ("a", "b")
    max_length: int = 1000
    temperature: float = 100.0


@dataclass
class World:
    """A running process: calls in through a pipe, answers out of one."""

    monkeypatch: pytest.MonkeyPatch
    queue_tokens: int = 10_000
    engine: Gate = field(default_factory=Gate)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    loads: dict[str, list[Future[Any]]] = field(default_factory=dict)
    by_hand: set[str] = field(default_factory=set)
    bases: dict[str, Gate] = field(default_factory=dict)
    base_loads: dict[str, Future[Any]] = field(default_factory=lambda: defaultdict(Future))

    def __post_init__(self) -> None:
        encoded = lambda _tokenizer, texts, most: SimpleNamespace(  # noqa: E731
            ids=[[1] * min(len(text), most) for text in texts], truncated=np.array([len(text) > most for text in texts])
        )
        self.monkeypatch.setattr(process, "encode", encoded)
        self.monkeypatch.setattr(process, "TOKEN_BUDGET", {"cpu": BUDGET})
        asked, self._ask = os.pipe()
        told, tells = os.pipe()
        bases = SimpleNamespace(
            device=torch.device("cpu"), engine=lambda key: self.bases[key[0]], tell=lambda _figures: None,
            load=lambda key: self.base_loads[key[0]],
        )  # fmt: skip
        self.bases["tiny"] = self.engine
        adapters = SimpleNamespace(get=self._adapter)
        self._out = os.fdopen(told, "rb")
        self.process = EngineProcess(
            bases, adapters, Figures(), os.fdopen(tells, "wb"), self.queue_tokens  # type: ignore[arg-type]
        )  # fmt: skip
        self.threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self._listen, self.process.tokenize, self.process.score,
                         lambda: self.process.read(os.fdopen(asked, "rb")))
        ]  # fmt: skip
        for thread in self.threads:
            thread.start()

    def ask(self, number: int, texts: Sequence[str], model: str = "m", base: str = "tiny", **more: Any) -> None:
        asked = MODEL | {"id": model, "base_model": base}
        message = {"type": "predict", "number": number, "model": asked, "texts": texts} | more
        os.write(self._ask, wire.pack(message))

    def warm(self, model: str, base: str, **more: Any) -> None:
        os.write(self._ask, wire.pack({"type": "warm", "model": MODEL | {"id": model, "base_model": base} | more}))

    def drop(self, number: int) -> None:
        os.write(self._ask, wire.pack({"type": "drop", "number": number}))

    def let(self, batches: int) -> None:
        for _ in range(batches):
            self.engine.open.release()

    def scoring(self, batches: int) -> None:
        until(lambda: len(self.engine.batches) >= batches, 20, f"{batches} batches are begun")

    def waits(self, tokens: int) -> None:
        until(lambda: self.process._rows.cost == tokens, 20, f"{tokens} tokens wait")

    def answer(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = until(lambda: self.answers.get(number), 20, f"call {number} is answered")
        return found

    def close(self) -> None:
        os.close(self._ask)
        self.let(100)
        self.threads[2].join(20)
        assert not self.threads[2].is_alive(), "it ends with its input"

    def _adapter(self, model: Any, _engine: Any) -> Future[Any]:
        adapter: Future[Any] = Future()
        if model.id == "thread":
            raise RuntimeError("can't start new thread")
        if model.id in self.by_hand:
            self.loads.setdefault(model.id, []).append(adapter)
        else:
            adapter.set_result(Adapter(model.id))
        return adapter

    def _listen(self) -> None:
        while (message := wire.read(self._out)) is not None:
            if "number" in message:
                assert message["number"] not in self.answers, "a call is answered once"
                self.answers[message["number"]] = message


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    yield made
    made.close()


def lengths(answer: dict[str, Any]) -> list[int]:
    """Of the call's texts, as the gate's logits tell them."""
    odds = np.frombuffer(answer["raw"]).reshape(-1, 2)
    return [round(100 * float(np.log(a / b))) for a, b in odds]


def test_a_large_call_is_split_and_single_texts_do_not_wait_for_its_end(world: World) -> None:
    texts = ["x" * (1 + i % 16) for i in range(1024)]
    world.ask(1, texts)
    world.scoring(1)
    world.waits(sum(map(len, texts)) - sum(n for _m, n in world.engine.batches[0]))
    world.ask(2, ["xyz"])
    until(lambda: len(world.process._rows._calls) == 2, 20, "the single text waits")
    world.let(2)
    assert lengths(world.answer(2)) == [3]
    assert 1 not in world.answers
    world.let(100)
    assert lengths(world.answer(1)) == [len(text) for text in texts], "in the order asked"
    assert all(sum(n for _m, n in batch) <= BUDGET for batch in world.engine.batches)


def test_what_is_warmed_is_counted_when_it_is_there_and_when_it_never_will_be(world: World) -> None:
    world.by_hand = {"damaged", "fine"}
    for name in ("fine", "damaged", "thread"):
        world.warm(name, "tiny")
    world.warm("", "tiny", files=[])
    world.warm("lost", "refused")
    until(lambda: len(world.base_loads) == 2, 20, "all are asked for")
    assert world.process._figures.warmed == 0
    world.base_loads["refused"].set_exception(InvalidData("It does not fit."))
    until(lambda: world.process._figures.warmed == 1, 20, "the base that is refused is counted")
    world.base_loads["tiny"].set_result(world.engine)
    assert world.process._figures.warmed == 3, "the base alone, and the one that could not be asked for"
    world.loads["damaged"][0].set_exception(InvalidData("It is damaged."))
    world.loads["fine"][0].set_result(Adapter("fine"))
    assert world.process._figures.warmed == 5


def test_an_adapter_that_is_being_loaded_holds_up_nobody_else(world: World) -> None:
    world.by_hand = {"slow"}
    world.ask(1, ["aa"], "slow")
    world.ask(2, ["bbb"])
    world.let(1)
    assert lengths(world.answer(2)) == [3]
    world.loads["slow"][0].set_result(Adapter("slow"))
    world.let(1)
    assert lengths(world.answer(1)) == [2]


def test_an_adapter_that_cannot_be_had_is_told_to_its_caller(world: World) -> None:
    world.by_hand = {"damaged"}
    world.ask(1, ["aa"], "damaged")
    until(lambda: world.loads.get("damaged"), 20, "it is asked for")
    world.loads["damaged"][0].set_exception(InvalidData("The file is not the one that was published."))
    assert world.answer(1)["error"]["code"] == "invalid_data"


def test_a_batch_that_fails_answers_every_caller_and_only_the_broken_call_with_an_error(world: World) -> None:
    world.engine.breaks = lambda adapters: any(adapter.name == "broken" for adapter in adapters)
    world.ask(0, ["first"])
    world.scoring(1)
    for number, model in ((1, "m"), (2, "broken"), (3, "n")):
        world.ask(number, ["x" * number], model)
    world.waits(6)
    world.let(5)  # the first; the three together; each alone
    assert world.answer(2)["error"]["code"] == "engine_failed"
    assert [lengths(world.answer(number)) for number in (1, 3)] == [[1], [3]]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), "the CPU's"])
def test_a_call_for_which_no_memory_is_left_may_ask_again_later(world: World, error: Any) -> None:
    if isinstance(error, str):
        with pytest.raises(RuntimeError) as raised:
            torch.empty(10**15)
        error = raised.value
    world.engine.breaks, world.engine.error = lambda _adapters: True, error
    world.ask(1, ["first"])
    world.let(2)
    assert world.answer(1)["error"]["code"] == "engine_unavailable"
    world.engine.breaks = lambda _adapters: False
    world.ask(2, ["again"])
    world.let(1)
    assert lengths(world.answer(2)) == [5]


def test_calls_of_two_bases_that_wait_together_are_scored_each_on_its_own(world: World) -> None:
    other = world.bases["another"] = Gate()
    world.ask(0, ["first"])
    world.scoring(1)
    for number, base in ((1, "tiny"), (2, "another"), (3, "tiny")):
        world.ask(number, ["x" * number], base=base)
    world.waits(6)
    world.let(2)
    other.open.release()
    assert [lengths(world.answer(number)) for number in (1, 2, 3)] == [[1], [2], [3]]
    assert world.engine.batches[1:] == [[("m", 1), ("m", 3)]]
    assert other.batches == [[("m", 2)]]


def test_a_call_that_is_dropped_while_its_adapter_is_read_is_not_kept(world: World) -> None:
    world.by_hand = {"slow"}
    world.ask(1, ["aa"], "slow")
    until(lambda: world.loads.get("slow") and world.process._open, 20, "it is asked for")
    gone = threading.Event()
    weakref.finalize(world.process._open[1], gone.set)
    world.drop(1)
    assert gone.wait(20)
    world.loads["slow"][0].set_result(Adapter("slow"))
    world.ask(2, ["bbb"])
    world.let(1)
    assert lengths(world.answer(2)) == [3]
    assert world.engine.batches == [[("m", 3)]]


def test_when_a_turn_is_over_nothing_of_its_calls_is_held(world: World) -> None:
    """Or the adapter cache would wait for room that nobody gives."""
    gone = threading.Event()
    world.by_hand = {"large"}
    world.ask(1, ["aa"], "large")
    until(lambda: world.loads.get("large"), 20, "it is asked for")
    adapter = Adapter("large")
    weakref.finalize(adapter, gone.set)
    world.loads["large"].pop().set_result(adapter)
    del adapter
    world.let(1)
    world.answer(1)
    assert gone.wait(20)


def test_a_call_that_is_dropped_costs_no_more_batches_and_is_not_answered(world: World) -> None:
    world.ask(1, ["x" * 16] * 1024)
    world.scoring(1)
    world.waits(16 * 1024 - BUDGET)
    world.drop(1)
    world.waits(0)
    world.ask(2, ["xx"])
    world.let(2)
    assert lengths(world.answer(2)) == [2]
    assert len(world.engine.batches) == 2
    assert 1 not in world.answers


def test_rows_whose_deadline_has_passed_are_not_scored(world: World) -> None:
    world.ask(1, ["x"] * 10, deadline=0.0)
    world.ask(2, ["xx"])
    world.let(1)
    world.answer(2)
    assert world.engine.batches == [[("m", 2)]]
    assert 1 not in world.answers
    assert world.process._open == {}


def test_over_the_queues_limit_a_call_is_refused_and_told_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, queue_tokens=100)
    world.process._figures.tokens_per_second = 10.0
    world.ask(1, ["x" * 60])
    world.scoring(1)
    world.ask(2, ["x" * 200])  # larger than the limit, and taken, for nothing waits
    world.waits(200)
    world.ask(3, ["x"])
    error = world.answer(3)["error"]
    assert (error["code"], error["retry_after_seconds"]) == ("queue_full", 20)
    world.let(2)
    assert lengths(world.answer(2)) == [200]
    world.close()


def test_a_frame_that_breaks_off_is_the_end_of_the_stream() -> None:
    whole = wire.pack({"a": "ü"}, b"\x00\xff")
    assert [wire.read(io.BytesIO(whole[:length])) for length in range(len(whole))] == [None] * len(whole)


def test_a_message_that_cannot_be_read_ends_the_process_so_that_another_is_started(world: World) -> None:
    with pytest.raises(KeyError):
        world.process.read(io.BytesIO(wire.pack({"type": "predict"})))
    assert world.process._closed


def test_frames_come_out_as_they_went_in() -> None:
    stream = io.BytesIO(wire.pack({"a": "ü"}, b"\x00\xff") + wire.pack({"b": 1}))
    assert [wire.read(stream), wire.read(stream), wire.read(stream)] == [{"a": "ü", "raw": b"\x00\xff"}, {"b": 1}, None]
