"""The engine's process: `python -P -m service.inference.process SETTINGS_JSON`.

It reads requests from standard input and writes answers to standard output. One thread reads; the main thread takes
whatever waits whenever the engine is free, mixes it into one batch per base, and answers each request by its number.
It ends when its standard input closes, so it never outlives the API.
"""

import json
import logging
import os
import queue
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.core import logs
from service.core.errors import AppError, BaseLoading
from service.inference import wire
from service.inference.bases import Adapters, Bases, Limits
from service.inference.wire import BATCH_BUCKETS, Figures, ServedModel
from service.ml.adapter import Adapter
from service.ml.calibration import softmax
from service.ml.encode import encode
from service.ml.engine import Engine, OnBatch
from service.storage import Storage

MAX_TEXTS_AT_ONCE = 1024
_SECONDS_BETWEEN_FIGURES = 1.0
log = logging.getLogger("tuneproof.engine")


@dataclass
class Request:
    """One call of `/predict`; after `deadline`, on this machine's monotonic clock, nobody waits for it any more.

    `request_id` is the API's, for the log.
    """

    number: int
    model: ServedModel
    texts: list[str]
    deadline: float = float("inf")
    request_id: str | None = None


@dataclass
class Ready:
    """A request whose texts are token ids and whose adapter is at hand."""

    request: Request
    adapter: Adapter
    ids: list[list[int]]
    truncated: NDArray[np.bool_]


class EngineProcess:
    """Requests in, answers out."""

    def __init__(self, bases: Bases, adapters: Adapters, answers: IO[bytes]) -> None:
        self._bases, self._adapters, self._answers = bases, adapters, answers
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._figures: Figures = adapters.figures
        self._told: Figures | None = None
        self._told_at = float("-inf")

    def read(self, requests: IO[bytes]) -> None:
        """Fills the queue until the API is gone."""
        while (message := wire.read(requests)) is not None:
            if message["type"] == "warm":
                self._warm((message["base_model"], message["base_revision"]))
            else:
                model = message["model"]
                served = ServedModel(**model | {"files": tuple(model["files"])})
                asked = {key: message[key] for key in ("number", "texts", "deadline", "request_id")}
                self._waiting.put(Request(model=served, **asked))
        self._waiting.put(None)

    def run(self) -> None:
        """Serves until the queue is closed."""
        while True:
            self._tell()
            try:
                first = self._waiting.get(timeout=_SECONDS_BETWEEN_FIGURES)
            except queue.Empty:
                continue
            if first is None:
                return
            batch, closed = [first], False
            while sum(len(request.texts) for request in batch) < MAX_TEXTS_AT_ONCE and not self._waiting.empty():
                following = self._waiting.get()
                if following is None:
                    closed = True
                    break
                batch.append(following)
            self._serve(batch)
            if closed:
                return

    def _serve(self, batch: Sequence[Request]) -> None:
        by_engine: dict[int, tuple[Engine, list[Ready]]] = {}
        now = time.monotonic()
        for request in batch:
            if request.deadline < now:
                continue
            try:
                engine = self._bases.engine((request.model.base_model, request.model.base_revision))
                ready = self._prepare(request, engine)
            except Exception as error:  # noqa: BLE001 -- one request's trouble must not be another's
                self._fail(request, error)
            else:
                by_engine.setdefault(id(engine), (engine, []))[1].append(ready)
        for engine, group in by_engine.values():
            try:
                self._score(engine, group)
            except Exception:  # noqa: BLE001 -- it is told where one request alone fails
                for ready in group:
                    try:
                        self._score(engine, [ready])
                    except Exception as error:  # noqa: BLE001
                        self._fail(ready.request, error)

    def _prepare(self, request: Request, engine: Engine) -> Ready:
        adapter = self._adapters.get(request.model, engine)
        encoded = encode(engine.backbone.tokenizer, request.texts, adapter.max_length)
        return Ready(request, adapter, encoded.ids, encoded.truncated)

    def _score(self, engine: Engine, group: Sequence[Ready]) -> None:
        ids = [row for ready in group for row in ready.ids]
        adapters = [ready.adapter for ready in group for _row in ready.ids]
        logits = engine.score(ids, adapters, self._counted())
        self._figures.tokens += sum(len(row) for row in ids)
        start = 0
        for ready in group:
            stop = start + len(ready.ids)
            probabilities = softmax(np.stack(logits[start:stop]), ready.adapter.temperature)
            self._answer(
                ready.request.number, labels=ready.adapter.labels, probabilities=probabilities.tolist(),
                truncated=ready.truncated.tolist(), tokens=sum(len(row) for row in ready.ids),
            )  # fmt: skip
            start = stop

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
        """Sends the figures, at most once a second, where they have changed. From the one thread that answers."""
        now = time.monotonic()
        if now - self._told_at < _SECONDS_BETWEEN_FIGURES:
            return
        self._told_at = now
        self._bases.tell(self._figures)
        if self._bases.device.type == "cuda":
            self._figures.gpu_allocated_bytes = torch.cuda.memory_allocated(self._bases.device)
            self._figures.gpu_reserved_bytes = torch.cuda.memory_reserved(self._bases.device)
        if self._figures != self._told:
            self._told = replace(self._figures, batches=list(self._figures.batches))
            self._send({"figures": asdict(self._told)})

    def _warm(self, key: tuple[str, str]) -> None:
        try:
            self._bases.engine(key)
        except BaseLoading:
            pass
        except AppError as error:
            log.warning("base not served: %s", error.detail)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, AppError):
            with logs.bound(request_id=request.request_id):
                log.error("a prediction failed", exc_info=error)
        code = error.code if isinstance(error, AppError) else "internal"
        detail = error.detail if isinstance(error, AppError) else "The engine failed on this call."
        self._answer(request.number, error={"code": code, "detail": detail})
        if isinstance(error, torch.AcceleratorError):
            os._exit(os.EX_SOFTWARE)  # the CUDA context is lost for good; the API starts a process with a new one

    def _answer(self, number: int, **body: Any) -> None:
        self._send({"number": number, **body})

    def _send(self, message: dict[str, Any]) -> None:
        self._answers.write(wire.pack(message))
        self._answers.flush()


def main(arguments: list[str]) -> int:
    """Runs until the API is gone."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    given = json.loads(arguments[0])
    logs.configure(given["log_level"], given["log_format"])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers
    torch.set_num_threads(given["threads"] or max(1, (os.cpu_count() or 2) // 2))
    limits = Limits(given["device"], given["dtype"], given["memory_bytes"], given["adapter_bytes"])
    models_dir = Path(given["models_dir"]) if given["models_dir"] else None
    storage = Storage(given["storage_url"])
    process = EngineProcess(Bases(models_dir, limits), Adapters(storage, limits.adapter_bytes), answers)
    threading.Thread(target=process.read, args=(sys.stdin.buffer,), daemon=True).start()
    process.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
