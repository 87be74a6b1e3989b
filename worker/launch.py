"""Where a job's child runs: here, a process on this machine. Another launcher could start it elsewhere."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import psutil

from service.core.spec import JobSpec


class Child(Protocol):
    """One attempt at a job, under way."""

    def messages(self, wait_seconds: float) -> Iterator[dict[str, Any]]:
        """What it has said since the last call; waits up to `wait_seconds` for something."""

    def ended(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""

    def ask_to_stop(self) -> None:
        """SIGTERM: it leaves its work where the last checkpoint stands."""

    def kill(self) -> None:
        """SIGKILL, to it and whatever it has started."""


# Of the compiled matrix products that torch and oneDNN each keep by size, rows laid end to end use few again.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
Launcher = Callable[[Path], Child]
"""Starts a child on a folder that `worker.run` understands. ConnectionError: what would run it is away."""


class LocalChild:
    """`python -P -m worker.child FOLDER` in a session of its own; ends when this process does, however that is.

    Its threads sleep while they wait: where others want the same cores, spinning ones made it 3.5 times slower.
    """

    program = ("-m", "worker.child")

    def __init__(self, folder: Path, variables: Mapping[str, str] = MappingProxyType({})) -> None:
        with (folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *self.program, str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env={**ENVIRONMENT, **os.environ, **variables},
            )  # fmt: skip
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def messages(self, wait_seconds: float) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(queue.Empty):
            yield self._said.get(timeout=wait_seconds)
            while True:
                yield self._said.get_nowait()

    def ended(self) -> int | None:
        # Not before everything it said has been read. It may hang after its last word, so it is not waited for.
        return None if self._reader.is_alive() else self._process.poll()

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None  # it was started with a pipe
        for line in self._process.stdout:
            # A killed child may leave half a line.
            with contextlib.suppress(ValueError):
                self._said.put(json.loads(line))


class LocalTeam:
    """Processes that train one model together, started as `torchrun` does. The first is the job's own."""

    def __init__(self, folder: Path, processes: int) -> None:
        address, port = "127.0.0.1", free_port("127.0.0.1")
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | speaks_by(address)
        self._first, *self._others = (
            LocalChild(folder, share | rank_variables(rank, processes, processes, address, port))
            for rank in range(processes)
        )

    def messages(self, wait_seconds: float) -> Iterator[dict[str, Any]]:
        return self._first.messages(wait_seconds)

    def ended(self) -> int | None:
        if any(child.ended() for child in self._others):
            self.kill()  # without one the others would wait for ever: the attempt is lost
        return self._first.ended()

    def ask_to_stop(self) -> None:
        self._first.ask_to_stop()

    def kill(self) -> None:
        for child in (self._first, *self._others):
            child.kill()


def processes_for(folder: Path, most: int) -> int:
    """How many processes the job in a folder can use: all where it trains, else one."""
    spec = json.loads((folder / "job.json").read_text(encoding="utf-8"))["spec"]
    return most if JobSpec.model_validate(spec).trains else 1


def rank_variables(rank: int, processes: int, here: int, address: str, port: int) -> dict[str, str]:
    """What `torch.distributed` reads; `here` of the processes run on this rank's machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank % here), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": address, "MASTER_PORT": str(port),
    }  # fmt: skip


def speaks_by(address: str) -> dict[str, str]:
    """What keeps ranks to the network that has this address; else each takes what its machine's name stands for."""
    networks = [name for name, found in psutil.net_if_addrs().items() if any(at.address == address for at in found)]
    return {name: networks[0] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if networks}


def free_port(address: str) -> int:
    """One that nobody listens on at the moment."""
    with socket.socket() as found:
        found.bind((address, 0))
        port: int = found.getsockname()[1]
        return port
