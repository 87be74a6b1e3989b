"""The engine's process: `python -P -m service.inference.process SETTINGS_JSON`.

It reads calls from standard input and writes answers to standard output. A call goes through four hands, so that none
waits for another's work: one thread reads it, loaders fetch its adapter where it is not at hand, one thread makes
token ids of its texts, and the main thread, whenever the engine is free, scores what waits: rows of many calls in one
batch, in the turns that `Schedule` gives. It ends when its standard input closes, so it never outlives the API.
"""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from service.core import logs
from service.core.errors import AppError, EngineFailed, EngineUnavailable, QueueFull
from service.inference import wire
from service.inference.adapters import Adapters
from service.inference.bases import Bases, Limits
from service.inference.schedule import Schedule
from service.inference.wire import BATCH_BUCKETS, Figures, ServedModel
from service.ml.adapter import Adapter
from service.ml.calibration import softmax
from service.ml.encode import encode
from service.ml.engine import TOKEN_BUDGET, Engine, OnBatch
from service.storage import Storage

# What one call may have in a batch while others wait: a quarter of it.
_TURNS_A_BATCH = 4
_CHARS_AT_ONCE = 1 << 16  # some 10 ms of tokenizing
_SECONDS_BETWEEN_FIGURES = 1.0
# What torch says of it: an error of its own on CUDA, a plain RuntimeError by the CPU's allocator, Apple's, and cuBLAS.
_NO_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
log = logging.getLogger("tuneproof.engine")


@dataclass(eq=False)
class Call:
    """One call of `/predict` with N texts; after `deadline`, on this machine's monotonic clock, nobody waits for it.

    `request_id` is the API's, for the log. What is below is filled in on the way.
    """

    number: int
    model: ServedModel
    texts: list[str]
    deadline: float = float("inf")
    request_id: str | None = None
    engine: Engine = field(init=False)
    adapter: Adapter = field(init=False)
    ids: dict[int, list[int]] = field(default_factory=dict)
    truncated: dict[int, bool] = field(default_factory=dict)
    logits: dict[int, NDArray[np.float32]] = field(default_factory=dict)


Rows = Sequence[tuple[Call, int]]


class EngineProcess:
    """Calls in, answers out. `read`, `tokenize` and `score` run in a thread each until the API is gone."""

    def __init__(
        self, bases: Bases, adapters: Adapters, figures: Figures, answers: IO[bytes], queue_tokens: int
    ) -> None:
        self._bases, self._adapters, self._figures = bases, adapters, figures
        self._answers, self._queue_tokens = answers, queue_tokens
        self._budget = TOKEN_BUDGET.get(bases.device.type, 4096)
        self._open: dict[int, Call] = {}
        self._texts: Schedule[Call] = Schedule(_CHARS_AT_ONCE // _TURNS_A_BATCH)
        self._rows: Schedule[Call] = Schedule(self._budget // _TURNS_A_BATCH)
        self._closed = False
        self._lock = threading.RLock()  # of all of the above
        self._texts_wait, self._rows_wait = threading.Condition(self._lock), threading.Condition(self._lock)
        self._answering = threading.Lock()
        self._told: Figures | None = None
        self._told_at = float("-inf")

    def read(self, requests: IO[bytes]) -> None:
        """Takes calls in; whatever ends that ends the process."""
        try:
            self._read(requests)
        finally:
            self._close()

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            self._rows_wait.notify()

    def _read(self, requests: IO[bytes]) -> None:
        while self._take_in(wire.read(requests)):
            pass

    def _take_in(self, message: dict[str, Any] | None) -> bool:
        """Whether there was one; holds nothing of it afterwards."""
        if message is None:
            return False
        kind = message.pop("type")
        if kind == "drop":
            self._forget(message["number"])
            return True
        message["model"]["files"] = tuple(message["model"]["files"])
        model = ServedModel(**message.pop("model"))
        if kind == "warm":
            self._bases.load((model.base_model, model.base_revision)).add_done_callback(partial(self._warm, model))
        else:
            self._admit(Call(model=model, **message))
        return True

    def tokenize(self) -> None:
        """Makes token ids of texts, the calls in turns; whatever ends that ends the process."""
        try:
            while True:
                with self._lock:
                    self._texts_wait.wait_for(lambda: self._texts)
                self._tokenize_a_turn()
        finally:
            self._close()

    def _tokenize_a_turn(self) -> None:
        """Like `_score_a_turn`, holds nothing of its calls when it is done: room for adapters may wait for that."""
        with self._lock:
            taken = self._texts.take(_CHARS_AT_ONCE)
        for call, rows in _by_call(taken).items():
            try:
                self._tokenize(call, rows)
            except Exception as error:  # noqa: BLE001 -- one call's trouble must not be another's
                self._fail(call, error)

    def score(self) -> None:
        """Scores token ids, the calls in turns."""
        while not self._closed:
            self._tell()
            with self._lock:
                self._rows_wait.wait_for(lambda: self._rows or self._closed, _SECONDS_BETWEEN_FIGURES)
            self._score_a_turn()

    def _score_a_turn(self) -> None:
        with self._lock:
            taken = self._rows.take(self._budget)
        start = time.monotonic()
        in_time = [(call, row) for call, row in taken if call.deadline >= start]
        for call in {call for call, _row in taken if call.deadline < start}:
            self._forget(call.number)
        for engine in {call.engine for call, _row in in_time}:
            self._score_whatever_fails(engine, [(call, row) for call, row in in_time if call.engine is engine])
        if in_time:
            self._measure(sum(len(call.ids[row]) for call, row in in_time), time.monotonic() - start)

    def _admit(self, call: Call) -> None:
        with self._lock:
            self._open[call.number] = call
        try:
            call.engine = self._bases.engine((call.model.base_model, call.model.base_revision))
            # By its number: whoever reads the adapter must not keep a call that was dropped meanwhile, and its texts.
            self._adapters.get(call.model, call.engine).add_done_callback(partial(self._loaded, call.number))
        except Exception as error:  # noqa: BLE001 -- one call's trouble must not be another's
            self._fail(call, error)

    def _loaded(self, number: int, adapter: Future[Adapter]) -> None:
        call, error = self._open.get(number), adapter.exception()
        if call is None:
            return
        if error is not None:
            self._fail(call, error)
            return
        call.adapter = adapter.result()
        with self._lock:
            if call.number in self._open:
                self._texts.push(call, map(len, call.texts))
                self._texts_wait.notify()

    def _tokenize(self, call: Call, rows: list[int]) -> None:
        encoded = encode(call.engine.backbone.tokenizer, [call.texts[row] for row in rows], call.adapter.max_length)
        call.ids |= zip(rows, encoded.ids, strict=True)
        call.truncated |= zip(rows, encoded.truncated.tolist(), strict=True)
        if len(call.ids) < len(call.texts):
            return
        costs = [len(call.ids[row]) for row in range(len(call.texts))]
        with self._lock:
            if call.number not in self._open:
                return
            if self._rows and self._rows.cost + sum(costs) > self._queue_tokens:
                raise self._full()
            self._rows.push(call, costs)
            self._rows_wait.notify()

    def _full(self) -> QueueFull:
        waiting, speed = self._rows.cost, self._figures.tokens_per_second
        return QueueFull(
            f"{waiting} tokens wait, and at most {self._queue_tokens} may (TUNEPROOF_PREDICT_QUEUE_TOKENS).",
            retry_after_seconds=max(1, ceil(waiting / speed)) if speed else 1,
        )

    def _score_whatever_fails(self, engine: Engine, rows: Rows) -> None:
        """Scores a batch; where that fails, each call alone, to tell which one it is."""
        try:
            self._score(engine, rows)
        except Exception:  # noqa: BLE001 -- it is told where one call alone fails
            for call, its_rows in _by_call(rows).items():
                try:
                    self._score(engine, [(call, row) for row in its_rows])
                except Exception as error:  # noqa: BLE001
                    self._fail(call, error)

    def _score(self, engine: Engine, rows: Rows) -> None:
        adapters = [call.adapter for call, _row in rows]
        for adapter in {*adapters}:
            engine.attach(adapter)
        logits = engine.score([call.ids[row] for call, row in rows], adapters, self._counted())
        done = []
        for (call, row), values in zip(rows, logits, strict=True):
            call.logits[row] = values
            if len(call.logits) == len(call.texts):
                answer = _answer(call)
                if self._forget(call.number):
                    done.append(answer)
        self._send(done)

    def _measure(self, tokens: int, seconds: float) -> None:
        self._figures.tokens += tokens
        before, now = self._figures.tokens_per_second, tokens / max(seconds, 1e-6)
        self._figures.tokens_per_second = 0.9 * before + 0.1 * now if before else now

    def _counted(self) -> OnBatch:
        """Counts the batches of one call to `Engine.score`."""
        before = 0

        def count(done: int, _total: int) -> None:
            nonlocal before
            self._figures.batches[bisect_left(BATCH_BUCKETS, done - before)] += 1
            self._figures.texts += done - before
            before = done

        return count

    def _tell(self) -> None:
        """Sends the figures, at most once a second, where they have changed."""
        now = time.monotonic()
        if now - self._told_at < _SECONDS_BETWEEN_FIGURES:
            return
        self._told_at = now
        self._bases.tell(self._figures)
        self._figures.waiting_tokens = self._rows.cost
        if self._bases.device.type == "cuda":
            self._figures.gpu_allocated_bytes = torch.cuda.memory_allocated(self._bases.device)
            self._figures.gpu_reserved_bytes = torch.cuda.memory_reserved(self._bases.device)
        if self._figures != self._told:
            self._told = replace(self._figures, batches=list(self._figures.batches))
            self._send([wire.pack({"figures": asdict(self._told)})])

    def _warm(self, model: ServedModel, base: Future[Engine]) -> None:
        """Loads an adapter before anybody asks for it; a model without files stands for its base alone."""
        if base.exception() is None and model.files:
            try:
                self._adapters.get(model, base.result()).add_done_callback(self._count_warmed)
            except Exception as error:  # noqa: BLE001 -- nobody else would be told of it
                failed: Future[Any] = Future()
                failed.set_exception(error)
                self._count_warmed(failed)
        else:
            self._count_warmed(base)

    def _count_warmed(self, warmed: Future[Any]) -> None:
        error = warmed.exception()
        if error is not None:
            log.warning("not warmed: %s", error.detail if isinstance(error, AppError) else type(error).__name__)
        with self._lock:
            self._figures.warmed += 1

    def _forget(self, number: int) -> bool:
        """Forgets a call; gives whether it was still open."""
        with self._lock:
            call = self._open.pop(number, None)
            if call is not None:
                self._texts.drop(call)
                self._rows.drop(call)
        return call is not None

    def _fail(self, call: Call, error: BaseException) -> None:
        if not isinstance(error, AppError):
            with logs.bound(request_id=call.request_id):
                log.error("a prediction failed", exc_info=error)
        if isinstance(error, AppError):
            told = error
        elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
            told = EngineUnavailable("The engine has no memory left for this call. Send fewer texts, or ask later.")
        else:
            told = EngineFailed("The engine failed on this call; its log says why.")
        if self._forget(call.number):
            self._send([wire.pack({"number": call.number} | wire.told(told))])
        if isinstance(error, torch.AcceleratorError):
            os._exit(os.EX_SOFTWARE)  # the CUDA context is lost for good; the API starts a process with a new one

    def _send(self, frames: Sequence[bytes]) -> None:
        with self._answering:
            self._answers.write(b"".join(frames))
            self._answers.flush()


def _answer(call: Call) -> bytes:
    rows = range(len(call.texts))
    # float64 like the confidences that thresholds were found on: one that stands on its threshold must not fall below.
    probabilities = softmax(np.stack([call.logits[row] for row in rows]), call.adapter.temperature)
    tokens = sum(map(len, call.ids.values()))
    head = {"number": call.number, "labels": call.adapter.labels, "truncated": [call.truncated[row] for row in rows],
            "tokens": tokens}  # fmt: skip
    return wire.pack(head, probabilities.tobytes())


def _by_call(rows: Rows) -> dict[Call, list[int]]:
    found: dict[Call, list[int]] = defaultdict(list)
    for call, row in rows:
        found[call].append(row)
    return found


def main(arguments: list[str]) -> NoReturn:
    """Runs until the API is gone."""
    from transformers.utils import logging as transformers_logging

    # Who stops a whole group of processes stops the API, which has calls to answer yet and then closes standard input.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    given = json.loads(arguments[0])
    logs.configure(given["log_level"], given["log_format"])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers
    torch.set_num_threads(given["threads"] or max(1, (os.cpu_count() or 2) // 2))
    torch.get_num_threads()  # takes it over for this thread; what a loader sets for its own would be taken otherwise
    limits = Limits(given["device"], given["dtype"], given["memory_bytes"], given["adapter_bytes"])
    models_dir = Path(given["models_dir"]) if given["models_dir"] else None
    storage = Storage(given["storage_url"])
    figures = Figures()
    adapters = Adapters(storage, limits.adapter_bytes, figures)
    process = EngineProcess(Bases(models_dir, limits), adapters, figures, answers, given["queue_tokens"])
    threading.Thread(target=process.read, args=(sys.stdin.buffer,), daemon=True).start()
    threading.Thread(target=process.tokenize, daemon=True).start()
    process.score()
    os._exit(0)  # nobody is left to wait for a load that is under way


if __name__ == "__main__":
    main(sys.argv[1:])
