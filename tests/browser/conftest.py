"""A browser, and the command as users start it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.waiting import until


# Not for the whole session: its event loop is the thread's, and other tests have their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as started,
    ):
        yield started


@dataclass
class Process:
    """One process of ours, whose parts are in `arguments`; it can be stopped and come back on the same port."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    port: int
    running: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                [sys.executable, "-P", "-m", *self.arguments], env=self.environment, stdout=log, stderr=log
            )

    def stop(self) -> None:
        if self.running is not None:
            self.running.send_signal(signal.SIGTERM)
            self.running.wait(60)
            self.running = None

    def answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/healthz").is_success
        return False

    def wait_until_it_answers(self) -> None:
        until(self.answers, 120, "the API answers")


Launch = Callable[..., Process]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Makes processes on one data folder and one free port; what still runs at the end is stopped."""
    folder = tmp_path_factory.mktemp("data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made: list[Process] = []

    def make(*arguments: str, **settings: object) -> Process:
        given = {"DATA_DIR": folder, "PORT": port, "POLL_SECONDS": "0.1", "MIN_FREE_BYTES": "0"} | settings
        environment = os.environ | {f"TUNEPROOF_{name}": str(value) for name, value in given.items()}
        made.append(Process(arguments, environment, folder / f"{len(made)}.log", port))
        return made[-1]

    yield make
    for process in made:
        process.stop()
