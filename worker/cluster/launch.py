"""Attempts on the nodes of a Ray cluster (`TUNEPROOF_LAUNCHER=ray`). The supervisor's folder travels there and back.

The process is the same as on one machine, below an actor on the node where Ray has found it a place. A node that is
lost is a process that was killed: the attempt is lost, and the next goes on from the last checkpoint.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from service.core.ids import new_id
from worker.cluster.nodes import Cluster
from worker.launch import Child, Launcher, LocalChild, free_port, processes_for, rank_variables, speaks_by
from worker.scratch import own_folder, remove

_PIECE_BYTES = 8 << 20
_LISTEN_SECONDS = 0.2
_SAYS_SO_SECONDS = 10.0  # how often one that waits for a place says that it still does
_CLOSING_SECONDS = 5.0
Message = dict[str, Any]
log = logging.getLogger("tuneproof.worker")


def launcher_on(cluster: Cluster, processes: int) -> Launcher:
    """Connects at once. Raises ConnectionError."""
    cluster.connect()

    def launch(folder: Path) -> Child:
        cluster.connect()
        return RayChild(folder, cluster, processes_for(folder, processes))

    return launch


class Place:
    """A folder on a node, and the process that works in it. Called from one side, in turn."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        root = Path(tempfile.gettempdir()) / f"tuneproof-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()  # of a link to a folder of ours, what is not locked would be removed
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{root} is not a folder of this user's alone.")
        self._folder: Path = self._held.enter_context(own_folder(root, new_id("wrk")))
        self._child: LocalChild | None = None

    def address(self) -> tuple[str, int]:
        """Where the other processes of this attempt find its first."""
        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def write(self, name: str, piece: bytes) -> None:
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as target:
            target.write(piece)

    def start(self, variables: dict[str, str]) -> str:
        if variables:
            variables = speaks_by(ray.util.get_node_ip_address()) | variables
        self._child = LocalChild(self._folder, variables)
        return str(self._folder)

    def listen(self) -> tuple[list[Message], int | None]:
        """What it has said since, and its exit status where that was all."""
        assert self._child is not None  # it was started
        ended = self._child.ended()
        return list(self._child.messages(0 if ended is not None else _LISTEN_SECONDS)), ended

    def files(self, folder: str) -> dict[str, int]:
        """Bytes of every file in a folder, or of the one file of that name."""
        path = self._folder / folder
        if not path.exists():
            raise FileNotFoundError(folder)
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        return {file.relative_to(self._folder).as_posix(): file.stat().st_size for file in found if file.is_file()}

    def read(self, name: str, start: int) -> bytes:
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read(_PIECE_BYTES)

    def ask_to_stop(self) -> None:
        if self._child is not None:
            self._child.ask_to_stop()

    def close(self) -> None:
        """Ends the process and leaves nothing of its folder."""
        if self._child is not None:
            self._child.kill()
        self._held.close()


# Else Ray would kill the process where its actor ends, and the process has a folder to remove (`worker.child`).
_PLACE: Any = ray.remote(
    max_restarts=0, max_task_retries=0, runtime_env={"env_vars": {"RAY_kill_child_processes_on_worker_exit": "false"}}
)(Place)


class RayChild:
    """An attempt under way somewhere in the cluster: a `worker.launch.Child`."""

    def __init__(self, folder: Path, cluster: Cluster, processes: int) -> None:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self._folder, self._bulk = folder, job["spec"].get("kind") == "predict"
        if self._bulk:
            (folder / "job.json").write_text(json.dumps(job | {"cluster": asdict(cluster)}), encoding="utf-8")
        self._shares_gpus = cluster.gpus < 1
        share = {"CPU": cluster.cpus} | ({"GPU": cluster.gpus} if cluster.gpus else {})
        if self._bulk:  # it computes nothing itself, and its actors need the places
            share = {"CPU": 1.0}
        try:
            self._group = placement_group([share] * processes, strategy="PACK")
        except RayError as error:
            raise ConnectionError(f"The Ray cluster cannot be reached ({type(error).__name__}).") from error
        self._places = [
            _PLACE.options(
                num_cpus=share["CPU"], num_gpus=share.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i),
            ).remote()
            for i in range(processes)
        ]  # fmt: skip
        self._said: queue.Queue[Message] = queue.Queue()
        self._status, self._here, self._killed = -int(signal.SIGKILL), False, False
        self._broke: Exception | None = None
        self._kept: list[Path] = []  # checkpoints that were fetched
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def messages(self, wait_seconds: float) -> Iterator[Message]:
        with contextlib.suppress(queue.Empty):
            yield self._said.get(timeout=wait_seconds)
            while True:
                yield self._said.get_nowait()
        if self._broke is not None:
            raise self._broke

    def ended(self) -> int | None:
        return None if self._thread.is_alive() else self._status

    def ask_to_stop(self) -> None:
        self._stop.set()

    def kill(self) -> None:
        """Ends it, and gives back its places."""
        if self._killed:
            return
        self._killed = True
        with contextlib.suppress(RayError, GetTimeoutError):
            ray.get([place.close.remote() for place in self._places if self._here], timeout=_CLOSING_SECONDS)
        for place in self._places:
            ray.kill(place)
        remove_placement_group(self._group)

    def _live(self) -> None:
        try:
            self._status = self._followed()
        except (RayError, OSError) as error:
            if self._killed:
                return
            if isinstance(error, RayError) and not isinstance(error, RayTaskError):
                log.warning("a process on the cluster was lost: %s", type(error).__name__)
            else:
                self._broke = error.cause if isinstance(error, RayTaskError) else error  # such as a full disk

    def _followed(self) -> int:
        """From waiting for a place to the last file. Gives the exit status."""
        if not self._placed():
            return os.EX_TEMPFAIL
        first, *others = self._places
        for file in sorted(path for path in self._folder.rglob("*") if path.is_file()):
            self._send(first, file)
        for place in others:
            self._send(place, self._folder / "job.json")
        address, n = ray.get(first.address.remote()), len(self._places)
        there, *_ = ray.get(
            [
                place.start.remote(rank_variables(i, n, n if self._shares_gpus else 1, *address) if others else {})
                for i, place in enumerate(self._places)
            ]
        )
        asked = False
        while True:
            if self._stop.is_set() and not asked:
                asked = True
                first.ask_to_stop.remote()
            (said, status), *rest = ray.get([place.listen.remote() for place in self._places])
            for message in said:
                self._pass_on(message, Path(there))
            if status is not None:
                self._fetch("log.txt")
                return int(status)
            if lost := [f"{rank} by {ended}" for rank, (_said, ended) in enumerate(rest, 1) if ended]:
                log.warning("of the processes that train together some have ended: %s", ", ".join(lost))
                return -int(signal.SIGKILL)  # without one the others would wait for ever

    def _placed(self) -> bool:
        """Waits until all places are there, and says so now and then; gives whether it was not told to stop before."""
        ready, told = [place.files.remote("") for place in self._places], float("-inf")
        while not self._stop.is_set():
            if len(ray.wait(ready, num_returns=len(ready), timeout=_LISTEN_SECONDS)[0]) == len(ready):
                ray.get(ready)
                self._here = True
                return True
            if time.monotonic() - told > _SAYS_SO_SECONDS:
                told = time.monotonic()
                waits = {"type": "progress", "stage": "prepare", "fraction": 0.0, "eta_seconds": None}
                self._said.put(waits | {"message": "waiting for a place in the cluster"})
        return False

    def _send(self, place: Any, file: Path) -> None:
        name = file.relative_to(self._folder).as_posix()
        with file.open("rb") as source:
            piece = source.read(_PIECE_BYTES)
            while True:  # an empty file is one too
                ray.get(place.write.remote(name, piece))
                if not (piece := source.read(_PIECE_BYTES)):
                    return

    def _pass_on(self, message: Message, there: Path) -> None:
        """The message, once the files that it names are here."""
        if message["type"] == "checkpoint":
            name = Path(message["folder"]).relative_to(there)
            try:
                self._fetch(name.as_posix())
            except FileNotFoundError:  # it is ahead, and has removed it: the next one is on its way
                return
            message["folder"] = str(self._folder / name)
            self._kept = [*(kept for kept in self._kept if kept != name), name]
            while len(self._kept) > 2:  # as the process itself does; the supervisor may be storing the one before
                remove(self._folder / self._kept.pop(0))
        elif message["type"] == "result":
            for folder in sorted({"out", *(str(made["folder"]) for made in message["models"])}):
                self._fetch(folder)
        self._said.put(message)

    def _fetch(self, folder: str) -> None:
        for name, size in ray.get(self._places[0].files.remote(folder)).items():
            target = self._folder / name
            if target.is_file() and target.stat().st_size == size and folder != "log.txt":
                continue  # what a checkpoint says is there does not change any more
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while file.tell() < size:
                    file.write(ray.get(self._places[0].read.remote(name, file.tell())))
