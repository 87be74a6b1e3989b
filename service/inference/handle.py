"""The end of an engine process that gives it work: starts it, hands it texts, starts it again when it is lost."""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from service.core import logs
from service.core.errors import (
    AppError,
    BaseLoading,
    BaseNotServed,
    DeadlinePassed,
    EngineFailed,
    EngineUnavailable,
    InvalidData,
    ModelDamaged,
    QueueFull,
)  # fmt: skip
from service.core.settings import Settings
from service.inference import wire
from service.inference.wire import Figures, ServedModel

_ERRORS: dict[str, type[AppError]] = {
    BaseLoading.code: BaseLoading, BaseNotServed.code: BaseNotServed, InvalidData.code: ModelDamaged,
    QueueFull.code: QueueFull, EngineUnavailable.code: EngineUnavailable, DeadlinePassed.code: DeadlinePassed,
}  # fmt: skip
_SECONDS_BETWEEN_STARTS = 1.0
_SECONDS_TO_WARM = 120.0  # a base that has to be fetched first keeps nobody from those that are there for longer
# The engine counts tokens once it has read a text. Before, characters are bounded, so that memory is: far above what a
# token takes, for a long text is cut.
_CHARS_A_TOKEN = 64
_READ_AT_ONCE_BYTES = 1 << 20
log = logging.getLogger("tuneproof.engine")


@dataclass(frozen=True)
class Scores:
    """Answers for N texts, all from one model.

    Args:
        labels: K labels.
        probabilities: `(N, K)`.
        truncated: N, whether the text was longer than the model reads.
        tokens: Read in all.
    """

    labels: tuple[str, ...]
    probabilities: ArrayLike
    truncated: list[bool]
    tokens: int


class EngineHandle:
    """The engine process, from an event loop. With TUNEPROOF_ENGINE=ray it is one that asks replicas.

    Raises:
        RuntimeError: Ray is to be used and not installed.
    """

    restarts = 0
    waiting_chars = 0
    figures: Figures | None = None
    """Of the process that runs now; None until it is ready for work."""

    def __init__(self, settings: Settings) -> None:
        if settings.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise RuntimeError("TUNEPROOF_ENGINE=ray needs Ray: pip install 'tuneproof[ray]'")
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._warm: Callable[[], Sequence[ServedModel]] = tuple
        self._n_to_warm, self._started = 0, 0.0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def warm(self) -> bool:
        """Whether it runs and has loaded what was to be loaded at its start, as far as that can be, or has had time."""
        figures, waited = self.figures, time.monotonic() - self._started > _SECONDS_TO_WARM
        ready = self.running and figures is not None and not figures.away
        return ready and figures is not None and (waited or figures.warmed >= self._n_to_warm)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def waiting_calls(self) -> int:
        return len(self._open)

    async def run(self, warm: Callable[[], Sequence[ServedModel]] = tuple) -> None:
        """Keeps the process alive until this task is cancelled.

        `warm` is asked at each start, in a thread, for what is to be loaded at once: models, and where their `files`
        are left out, bases alone.
        """
        self._warm = warm
        while True:
            try:
                await self._live_once()
            except Exception as error:  # noqa: BLE001 -- whatever it was, the next one may live
                log.error("the engine was lost: %s", type(error).__name__)
                if self.running and self._process is not None:
                    self._process.kill()
            finally:
                self.figures = None
                self._fail_open_calls()
            self.restarts += 1
            log.warning("the engine process ended; starting it again")
            await asyncio.sleep(_SECONDS_BETWEEN_STARTS)

    async def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            assert process.stdin is not None  # it was started with a pipe
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def predict(self, model: ServedModel, texts: list[str]) -> Scores:
        """Scores texts with one model. Where this is cancelled, the engine drops what is left of it.

        Raises:
            EngineUnavailable, BaseLoading, BaseNotServed, QueueFull, DeadlinePassed: as their names say.
            ModelDamaged: the model's files are not the published ones.
            EngineFailed: on these texts, and it would again.
        """
        return _scores(await self.ask(model, texts, self._settings.predict_timeout_seconds))

    async def ask(self, model: ServedModel, texts: list[str], allowed_seconds: float) -> dict[str, Any]:
        """The engine's answer as it came, which may hold an error; raises what it has no part in, as `predict` does."""
        process, size = self._process, sum(map(len, texts))
        if process is None or process.returncode is not None or process.stdin is None or self.figures is None:
            raise EngineUnavailable("The engine is starting. Ask again in a moment.")
        if self.figures.away:
            raise EngineUnavailable("No replica answers at the moment. Ask again shortly.")
        # One call is always taken, however large, or it never could be.
        if self.waiting_chars and self.waiting_chars + size > self._settings.predict_queue_tokens * _CHARS_A_TOKEN:
            raise QueueFull("More texts are waiting than the service takes on (TUNEPROOF_PREDICT_QUEUE_TOKENS).")
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        self.waiting_chars += size
        try:
            asked = {"number": number, "model": vars(model), "texts": texts, "request_id": logs.request_id(),
                     "deadline": time.monotonic() + allowed_seconds}  # fmt: skip
            process.stdin.write(wire.pack({"type": "predict"} | asked))
            async with asyncio.timeout(allowed_seconds):
                await process.stdin.drain()
                return await answer
        except TimeoutError:
            after = f"No answer within {round(allowed_seconds, 1):g} s."
            raise DeadlinePassed(f"{after} Send fewer texts a call, or ask later.") from None
        except (ConnectionError, RuntimeError):
            raise EngineUnavailable("The engine was lost and is being started again. Ask again in a moment.") from None
        finally:
            self.waiting_chars -= size
            del self._open[number]
            if not answer.done() or answer.cancelled():
                with contextlib.suppress(ConnectionError, RuntimeError):  # it may be gone itself
                    process.stdin.write(wire.pack({"type": "drop", "number": number}))
            answer.cancel()  # an error that nobody waits for any more is not one to log

    async def _live_once(self) -> None:
        settings = self._settings
        given = {
            "device": settings.serve_device, "dtype": settings.serve_dtype, "threads": settings.serve_threads,
            "memory_bytes": settings.serve_memory_bytes, "adapter_bytes": settings.adapter_cache_bytes,
            "models_dir": str(settings.models_dir) if settings.models_dir else None,
            "storage_url": settings.resolved_storage_url, "queue_tokens": settings.predict_queue_tokens,
            "log_level": settings.log_level, "log_format": settings.log_format, "ray_address": settings.ray_address,
        }  # fmt: skip
        program = "service.inference.process" if settings.engine == "local" else "service.inference.replicas"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", program, json.dumps(given),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_READ_AT_ONCE_BYTES,
            start_new_session=True,
            # Threads that wait spin for some 30 us: to be woken costs a small batch half its speed, and longer ones
            # would take the cores from training on the same machine. bf16 products of every new size are kept twice, by
            # torch and by oneDNN: a gigabyte of them after ten minutes, and no faster, as sizes rarely recur. A batch
            # of adapters of one rank has five. And one heap for all threads: what one lets go of, another can use.
            env={
                "GOMP_SPINCOUNT": "10000", "LRU_CACHE_CAPACITY": "10", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "10",
                "MALLOC_ARENA_MAX": "1", "TMPDIR": str(settings.data_dir.absolute() / "tmp"),
            }
            | os.environ,
        )  # fmt: skip
        self._process = process
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        models = await asyncio.to_thread(self._warm)
        self._n_to_warm, self._started = len(models), time.monotonic()
        for model in models:
            process.stdin.write(wire.pack({"type": "warm", "model": vars(model)}))
        while (message := await wire.read_async(process.stdout)) is not None:
            if "figures" in message:
                self.figures = Figures(**message["figures"])
                continue
            answer = self._open.get(message["number"])
            if answer is not None and not answer.done():
                answer.set_result(message)
        await process.wait()

    def _fail_open_calls(self) -> None:
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the engine process ended"))


def _scores(message: dict[str, Any]) -> Scores:
    if "error" in message:
        error = message["error"]
        kind = _ERRORS.get(error["code"], EngineFailed)
        raise kind(error["detail"], retry_after_seconds=error["retry_after_seconds"])
    probabilities = np.frombuffer(message["raw"]).reshape(-1, len(message["labels"]))
    return Scores(tuple(message["labels"]), probabilities, message["truncated"], message["tokens"])
