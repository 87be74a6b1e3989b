"""A service in processes of its own that are killed and stopped at random moments, and what must be true afterwards.

As a program it is where workers come from: it imports theirs once and forks one for every line on its standard input,
so that a new worker costs milliseconds.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from service.core.clock import utc_now
from service.core.settings import Settings
from service.db import garbage
from service.db.engine import Database
from service.db.models import Artifact, Dataset, Event, Job, Model
from service.storage import Storage
from tests.waiting import until
from tuneproof.demo import free_port
from worker.launch import Child, LocalChild
from worker.supervisor import Supervisor

ROOT = Path(__file__).parents[1]
REAL = 7
"""The seed of a job whose child is a real one, where models are there; all others are stubs."""


class StubChild(LocalChild):
    program = (str(ROOT / "tests/chaos_child.py"),)


def launch(folder: Path) -> Child:
    real = json.loads((folder / "job.json").read_text())["spec"]["seed"] == REAL
    return (LocalChild if real else StubChild)(folder)


def fork_workers() -> None:
    """One for each line, its settings as JSON, answered by its process id; all of them end with this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            _work(Settings(**json.loads(line)))
        print(pid, flush=True)


def _work(settings: Settings) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    supervisor = Supervisor(settings, launch)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stop.set())
    status = 1
    try:
        supervisor.run()
        status = 0
    finally:
        os._exit(status)


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def family(pid: int) -> list[int]:
    """A process and all below it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        below = [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
        return [pid, *(grandchild for child in below for grandchild in family(child))]
    return []


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Workers:
    """Some workers on one data folder; one that is gone is replaced when it is looked at."""

    def __init__(self, count: int, **settings: Any) -> None:
        self.settings = json.dumps(settings, default=str)
        log = (settings["data_dir"] / "worker.log").open("ab")
        self._forks = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.chaos"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        )  # fmt: skip
        log.close()
        self.pids = [self._start() for _ in range(count)]
        self.stopped: dict[int, float] = {}
        self.kills = self.stops = 0

    def replace_lost(self) -> None:
        self.pids = [pid if alive(pid) else self._start() for pid in self.pids]

    def kill_one(self, chance: random.Random) -> None:
        kill(chance.choice(self.pids))
        self.kills += 1

    def stop_one(self, chance: random.Random, seconds: float) -> None:
        """It stands still, whatever it is at, and goes on after so long."""
        awake = [pid for pid in self.pids if pid not in self.stopped]
        if len(awake) > 1:
            pid = chance.choice(awake)
            kill(pid, signal.SIGSTOP)
            self.stopped[pid] = time.monotonic() + seconds
            self.stops += 1

    def wake(self, now: float) -> None:
        for pid, due in list(self.stopped.items()):
            if due <= now:
                kill(pid, signal.SIGCONT)
                del self.stopped[pid]

    def close(self) -> None:
        self.wake(float("inf"))
        for pid in self.pids:
            kill(pid, signal.SIGTERM)
        try:
            until(lambda: not any(map(alive, self.pids)), 30, "the workers end when they are asked to")
        finally:
            for pid in self.pids:
                kill(pid)
            assert self._forks.stdin is not None
            self._forks.stdin.close()
            self._forks.wait(20)

    def _start(self) -> int:
        assert self._forks.stdin is not None and self._forks.stdout is not None  # noqa: PT018
        self._forks.stdin.write(self.settings + "\n")
        self._forks.stdin.flush()
        return int(self._forks.stdout.readline())


class ServerProcess:
    """`python -P -m service serve` on a free port, with its engine."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.data_dir, self.port, self.kills = data_dir, free_port(), 0
        given = {"data_dir": data_dir, "port": self.port, "min_free_bytes": 0} | settings
        self._env = os.environ | {f"TUNEPROOF_{name.upper()}": str(value) for name, value in given.items()}
        self._env |= {"PYTHONPATH": str(ROOT)}
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        with (self.data_dir / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service", "serve"], env=self._env, stdout=log, stderr=log
            )
        until(self._answers, 120, "the server answers")

    def kill(self) -> None:
        """Everything it runs, at once."""
        for pid in family(self.process.pid):
            kill(pid)
        self.process.wait()
        self.kills += 1

    def restart(self) -> None:
        self.kill()
        self.start()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(40)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.data_dir / "server.log").read_text()[-2000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/healthz").is_success
        return False


def table(number: int, chance: random.Random) -> bytes:
    """Its bytes are no other table's."""
    rows = chance.randrange(10, 2000)
    lines = [
        b"text %d of %d %x,%s" % (i, number, chance.getrandbits(64), (b"fee", b"refund")[i % 2]) for i in range(rows)
    ]
    return b"text,label\n" + b"\n".join(lines) + b"\n"


@dataclass
class Uploader:
    """Uploads, and starts jobs, one after the other, and remembers what was acknowledged."""

    url: str
    seed: int = 0
    pause_seconds: float = 0.0
    datasets: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    failed: int = 0
    surprises: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Uploader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    @property
    def acknowledged(self) -> int:
        return len(self.datasets) + len(self.jobs)

    def _run(self) -> None:
        chance, number = random.Random(self.seed), 0
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self._enough.wait(self.pause_seconds):
                number += 1
                content = table(number, chance)
                try:
                    self._send(client, number, content)
                except httpx.TransportError:
                    self.failed += 1
                    self._enough.wait(0.05)

    def _send(self, client: httpx.Client, number: int, content: bytes) -> None:
        file = {"file": ("a.csv", content)}
        answer = client.post("/jobs" if number % 3 == 0 else "/datasets", files=file)
        if not answer.is_success:
            self.surprises.append(answer.text)
        elif answer.status_code == 202:
            job = answer.json()
            self.jobs[job["id"]] = job["dataset_id"]
        else:
            dataset = answer.json()
            if dataset["sha256"] != hashlib.sha256(content).hexdigest():
                self.surprises.append(f"{dataset['id']} has another hash than what was sent")
            self.datasets[dataset["id"]] = dataset["sha256"]
            if number % 3 == 1:
                job = client.post("/jobs", json={"dataset_id": dataset["id"]}).raise_for_status().json()
                self.jobs[job["id"]] = dataset["id"]


def lost_uploads(uploaders: list[Uploader], client: httpx.Client, data_dir: Path) -> list[str]:
    """Ids that were acknowledged and are not there, or not whole."""
    lost = []
    with sqlite3.connect(data_dir / "tuneproof.db") as connection:
        keys = dict(connection.execute("SELECT id, storage_key FROM datasets"))
    for uploader in uploaders:
        for job_id, dataset_id in uploader.jobs.items():
            answer = client.get(f"/jobs/{job_id}")
            if answer.status_code != 200 or answer.json()["dataset_id"] != dataset_id:
                lost.append(job_id)
        for dataset_id in {*uploader.datasets, *uploader.jobs.values()}:
            answer = client.get(f"/datasets/{dataset_id}")
            said = answer.json()["sha256"] if answer.status_code == 200 else None
            path = data_dir / "storage" / keys.get(dataset_id, "none")
            stored = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "nothing"
            if said != stored or said != uploader.datasets.get(dataset_id, said):
                lost.append(dataset_id)
    return lost


def integrity(data_dir: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(data_dir / "tuneproof.db") as connection:
        checked = connection.execute("PRAGMA integrity_check").fetchall()
        return checked + connection.execute("PRAGMA foreign_key_check").fetchall()


@dataclass
class Outcome:
    """What became of the jobs: ids, and what is wrong with each."""

    jobs: int = 0
    trained: int = 0
    attempts: int = 0
    not_succeeded: list[str] = field(default_factory=list)
    published_twice: list[str] = field(default_factory=list)
    not_whole: list[str] = field(default_factory=list)


def outcome(db: Database, data_dir: Path) -> Outcome:
    """Every job is to have succeeded once, with the files and the model of its last attempt alone, byte for byte."""
    found = Outcome()
    with db.read() as session:
        for job in session.scalars(select(Job)):
            found.jobs, found.attempts = found.jobs + 1, found.attempts + job.attempt
            found.trained += job.spec["seed"] == REAL
            if job.status != "succeeded":
                found.not_succeeded.append(f"{job.id} {job.status} {job.error}")
                continue
            ends = select(func.count()).where(Event.job_id == job.id, Event.message == "succeeded")
            models = list(session.scalars(select(Model).where(Model.job_id == job.id)))
            artifacts = list(session.scalars(select(Artifact).where(Artifact.job_id == job.id)))
            methods = [model.method for model in models]
            if session.scalar(ends) != 1 or len(set(methods)) != len(methods):
                found.published_twice.append(job.id)
            if {artifact.storage_key.split("/")[2].split("-")[0] for artifact in artifacts} != {str(job.attempt)}:
                found.published_twice.append(job.id)
            if not _is_whole(job, artifacts, models, data_dir / "storage"):
                found.not_whole.append(job.id)
    return found


def _is_whole(job: Job, artifacts: list[Artifact], models: list[Model], storage: Path) -> bool:
    files = [storage / model.storage_prefix / name for model in models for name in model.files]
    if job.spec["seed"] == REAL:
        written = len(artifacts) > 5
    else:
        assert job.summary is not None
        stored = files + [storage / artifact.storage_key for artifact in artifacts]
        written = len(stored) == 4 and all(job.summary["headline"] in path.read_text() for path in stored)
    known = job.model_id in {model.id for model in models} and all(path.is_file() for path in files)
    return (
        written
        and known
        and all(
            hashlib.sha256((storage / artifact.storage_key).read_bytes()).hexdigest() == artifact.sha256
            for artifact in artifacts
        )
    )


def strays(db: Database, storage: Storage, data_dir: Path) -> set[str]:
    """Files that no row names once everything that is noted as garbage was collected."""
    while due := garbage.due(db, utc_now() + timedelta(days=2)):
        for garbage_id, prefix in due:
            storage.delete(prefix)
            garbage.collected(db, garbage_id)
    with db.read() as session:
        named = {*session.scalars(select(Artifact.storage_key)), *session.scalars(select(Dataset.storage_key))}
        named |= {f"{model.storage_prefix}/{name}" for model in session.scalars(select(Model)) for name in model.files}
    root = data_dir / "storage"
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - named


def disturb(
    workers: Workers, chance: random.Random, every_seconds: float, stop_seconds: float, go_on: Callable[[], bool],
    most: int,
) -> Iterator[None]:  # fmt: skip
    """Kills or stops a worker now and then, `most` times at most; a look at each round."""
    following = time.monotonic()
    while go_on():
        now = time.monotonic()
        workers.wake(now)
        workers.replace_lost()
        if now >= following and workers.kills + workers.stops < most:
            following = now + chance.uniform(0.5, 1.5) * every_seconds
            if chance.random() < 0.6:
                workers.kill_one(chance)
            else:
                workers.stop_one(chance, stop_seconds)
        yield
        time.sleep(0.02)


def open_jobs(db: Database) -> int:
    with db.read() as session:
        return session.scalar(select(func.count()).where(Job.status.in_(("queued", "running", "cancelling")))) or 0


if __name__ == "__main__":
    fork_workers()
