"""While the engine is busy: the API answers others, drops who hung up, and says when to come back."""

import asyncio
import io
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.core.errors import EngineFailed, EngineUnavailable, QueueFull
from service.core.settings import Settings
from service.inference import wire
from service.inference.handle import EngineHandle
from service.inference.wire import Figures, ServedModel
from tests.integration.conftest import QuietEngine, listening, make_app
from tests.problems import problem_of
from tests.rows import add_published
from tests.waiting import until

MODEL = ServedModel("mdl_1", "tiny", "r", "models/mdl_1", ("manifest.json",))
CALLS = 50


class Saturated(QuietEngine):
    """Takes every call, and answers none."""

    def __init__(self) -> None:
        self.waiting = self.cancelled = 0

    async def predict(self, model: ServedModel, texts: list[str]) -> Any:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def test_healthz_answers_while_the_engine_is_saturated_and_callers_who_hang_up_are_dropped(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    ctx, engine = app.state.context, Saturated()
    ctx.engine = engine
    _job, model_id = add_published(ctx.db, ctx.storage)
    body = f'{{"model":"{model_id}","text":"x"}}'
    call = f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    with listening(app) as url:
        address = url.removeprefix("http://").split(":")
        callers = [socket.create_connection((address[0], int(address[1]))) for _ in range(CALLS)]
        for caller in callers:
            caller.sendall(call)
        until(lambda: engine.waiting == CALLS, 20, "every call waits")
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        assert engine.cancelled == 0
        for caller in callers:
            caller.close()
        until(lambda: engine.cancelled == CALLS, 20, "every call is dropped")


def test_a_full_queue_says_when_to_come_back(start: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
    client = start()
    ctx = client.app.state.context  # type: ignore[attr-defined]

    async def full(_model: ServedModel, _texts: list[str]) -> Any:
        raise QueueFull("Too many tokens wait.", retry_after_seconds=17)

    monkeypatch.setattr(ctx.engine, "predict", full, raising=False)
    _job, model_id = add_published(ctx.db, ctx.storage)
    answer = client.post("/predict", json={"model": model_id, "text": "x"})
    problem_of(answer, 429, "queue_full")
    assert answer.headers["retry-after"] == "17"


class Pipe:
    """An engine process's standard input, which keeps what was written."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []

    def write(self, frame: bytes) -> None:
        message = wire.read(io.BytesIO(frame))
        assert message is not None
        self.frames.append(message)

    async def drain(self) -> None:
        pass


def handle(**settings: Any) -> tuple[EngineHandle, Pipe]:
    made, pipe = EngineHandle(Settings(**settings)), Pipe()
    made._process = SimpleNamespace(returncode=None, stdin=pipe)  # type: ignore[assignment]
    made.figures = Figures()
    return made, pipe


def kinds(pipe: Pipe) -> list[tuple[str, int]]:
    return [(frame["type"], frame["number"]) for frame in pipe.frames]


def test_while_no_replica_answers_a_call_is_told_so_at_once_and_not_where_the_cluster_is() -> None:
    engine, pipe = handle()
    engine.figures = Figures(replicas=0, away="The Ray cluster head.internal:6379 cannot be reached.")
    with pytest.raises(EngineUnavailable, match=r"^No replica answers at the moment\. Ask again shortly\.$"):
        asyncio.run(engine.predict(MODEL, ["a text"]))
    assert pipe.frames == []


def test_replicas_without_ray_are_refused_at_the_start_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'tuneproof\[ray\]'"):
        make_app(tmp_path, engine="ray")


@pytest.mark.parametrize("seconds", [60.0, 0.01], ids=["hung up", "too late"])
def test_the_engine_is_told_to_drop_a_call_that_nobody_waits_for(seconds: float) -> None:
    async def main() -> Pipe:
        engine, pipe = handle(predict_timeout_seconds=seconds)
        call = asyncio.create_task(engine.predict(MODEL, ["a text"]))
        await asyncio.sleep(0)
        if seconds == 60:
            call.cancel()
        await asyncio.wait([call])
        assert (engine.waiting_chars, engine.waiting_calls) == (0, 0)
        return pipe

    assert kinds(asyncio.run(main())) == [("predict", 0), ("drop", 0)]


def test_an_answer_that_came_is_not_dropped_after() -> None:
    async def main() -> Pipe:
        engine, pipe = handle()
        call = asyncio.create_task(engine.predict(MODEL, ["a", "b"]))
        await asyncio.sleep(0)
        raw = b"".join(bytes(8) for _ in range(6))
        engine._open[0].set_result({"labels": list("xyz"), "truncated": [False, True], "tokens": 4, "raw": raw})
        scores = await call
        assert (scores.labels, scores.truncated, scores.tokens) == (("x", "y", "z"), [False, True], 4)
        assert scores.probabilities.tolist() == [[0.0] * 3] * 2  # type: ignore[union-attr]
        return pipe

    assert kinds(asyncio.run(main())) == [("predict", 0)]


def test_texts_that_the_engine_fails_on_are_500_and_not_asked_for_again() -> None:
    async def main() -> None:
        engine, _pipe = handle()
        call = asyncio.create_task(engine.predict(MODEL, ["a"]))
        await asyncio.sleep(0)
        error = {"code": "engine_failed", "detail": "The engine failed on this call.", "retry_after_seconds": None}
        engine._open[0].set_result({"number": 0, "error": error})
        with pytest.raises(EngineFailed):
            await call

    asyncio.run(main())


def test_characters_that_wait_are_bounded_and_one_call_is_always_taken() -> None:
    async def main() -> None:
        engine, _pipe = handle(predict_queue_tokens=1)
        first = asyncio.create_task(engine.predict(MODEL, ["x" * 1000]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await engine.predict(MODEL, ["x"])
        first.cancel()

    asyncio.run(main())


def test_before_the_engine_is_ready_for_work_nobody_waits_for_it() -> None:
    engine, _pipe = handle()
    engine.figures = None
    with pytest.raises(EngineUnavailable):
        asyncio.run(engine.predict(MODEL, ["x"]))
