"""The API as a client sees it: real ASGI, real database and storage; the engine is quiet unless a test is about it."""

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.core.clock import Clock
from service.core.errors import EngineUnavailable
from service.core.settings import Settings
from service.inference.handle import EngineHandle, Scores
from service.inference.wire import Figures, ServedModel
from service.main import create_app
from service.server import Server
from tests.databases import database_url, fresh_database
from tests.rows import Steady, StillClock
from tests.waiting import until

LOOPBACK = ("127.0.0.1", 50_000)
ELSEWHERE = ("203.0.113.7", 50_000)


class QuietEngine:
    """Runs, and never answers: what the API has beside it where no test is about predictions."""

    running, pid, figures = True, None, Figures()
    restarts = waiting_calls = waiting_chars = _n_to_warm = 0
    _started = math.inf  # it never waits too long
    warm = EngineHandle.warm

    async def run(self, warm: Callable[[], Sequence[ServedModel]] = tuple) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        pass

    async def predict(self, model: ServedModel, texts: list[str]) -> Scores:
        raise EngineUnavailable("The engine is starting. Ask again in a moment.")


def make_app(data_dir: Path, *, clock: Clock | None = None, fresh: bool = True, **settings: Any) -> FastAPI:
    """The application over an empty database, or what is there; its time stands still unless a clock is given."""
    data_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        fresh_database(data_dir).close()
    given = {"min_free_bytes": 0, "database_url": database_url(data_dir)} | settings
    app = create_app(Settings(data_dir=data_dir, **given), clock or StillClock())
    app.state.context.engine = QuietEngine()
    app.state.context.steady = Steady()
    return app


@contextlib.contextmanager
def api(data_dir: Path, *, client: tuple[str, int] = LOOPBACK, **given: Any) -> Iterator[TestClient]:
    with TestClient(make_app(data_dir, **given), client=client, follow_redirects=False) as started:
        yield started


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Starts an API of its own for this test, with these settings."""
    with contextlib.ExitStack() as stack:
        yield lambda **given: stack.enter_context(api(tmp_path / "data", **given))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One API for all tests of a module: what one sends must not harm the next."""
    with api(tmp_path_factory.mktemp("api") / "data", max_upload_bytes=300_000, max_labels=20) as client:
        yield client


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application behind uvicorn on a free port; gives its URL."""
    server = Server(app, host="127.0.0.1", port=0, log_config=None, access_log=False, server_header=False)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, 20, "the server listens")
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


Listening = Callable[..., AbstractContextManager[str]]
