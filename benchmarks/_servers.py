"""The servers that are measured, each in a process of its own on a free port of 127.0.0.1."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.core.settings import Settings

ROOT = Path(__file__).parents[1]
_SECONDS_TO_START = 180


@dataclass
class Running:
    """A server that answers."""

    port: int
    process: psutil.Process

    @property
    def children(self) -> list[psutil.Process]:
        return list(self.process.children(recursive=True))

    @property
    def cpu_seconds(self) -> float:
        """Of its own process, its children's aside."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def get(self, path: str, key: str = "") -> tuple[int, str]:
        """Status and body; 0 where nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()


@contextlib.contextmanager
def service(settings: Settings, threads: int, key: str) -> Iterator[Running]:
    """The real service over a data folder, ready to predict on its base."""
    given = {
        "TUNEPROOF_DATA_DIR": str(settings.data_dir), "TUNEPROOF_SERVE_THREADS": str(threads),
        "TUNEPROOF_ADAPTER_CACHE_BYTES": str(settings.adapter_cache_bytes), "TUNEPROOF_LOG_LEVEL": "error",
        "TUNEPROOF_SERVE_DEVICE": "cpu",
    }  # fmt: skip
    port = _free_port()
    command = [sys.executable, "-P", "-m", "service", "serve", "--port", str(port)]

    def ready(running: Running) -> bool:
        # Ready while bases are still being loaded; the metrics tell when they are.
        loaded = "tuneproof_bases 1.0" in running.get("/metrics", key)[1]
        return loaded and running.get("/readyz")[0] == 200

    with _started(command, given, port, ready) as running:
        yield running


@contextlib.contextmanager
def plain(folders: Sequence[Path]) -> Iterator[Running]:
    """The plain server over adapters of the same number of labels."""
    port = _free_port()
    command = [sys.executable, str(Path(__file__).with_name("_plain_server.py")), str(port), *map(str, folders)]
    with _started(command, {}, port, lambda running: running.get("/openapi.json")[0] == 200) as running:
        yield running


@contextlib.contextmanager
def _started(
    command: Sequence[str], given: dict[str, str], port: int, ready: Callable[[Running], bool]
) -> Iterator[Running]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TUNEPROOF_")}
    process = subprocess.Popen(command, env=inherited | {"PYTHONPATH": str(ROOT)} | given)
    try:
        running = Running(port, psutil.Process(process.pid))
        deadline = time.monotonic() + _SECONDS_TO_START
        while not ready(running):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server does not start (status {process.poll()}): {' '.join(command[:5])}")
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait(40)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
