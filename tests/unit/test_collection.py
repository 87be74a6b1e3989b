"""Whatever happens in whatever order, and wherever it is cut off: what a row names is there, and nothing else stays."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.datastructures import UploadFile

from service.api import datasets
from service.api.context import Context
from service.api.schemas import DatasetForm
from service.core.errors import Conflict
from service.core.settings import Settings
from service.core.spec import JobSpec
from service.db import catalog, garbage, jobs
from service.db.models import Artifact, Dataset, Garbage, Job, Model
from service.inference.handle import EngineHandle
from service.main import _round
from service.storage import Storage
from tests.databases import fresh_database
from tests.rows import StillClock
from worker import supervisor as supervisor_module
from worker.supervisor import Supervisor

LEASE_SECONDS, GRACE_SECONDS = 30, 60
A_DAY = garbage.UNNAMED.total_seconds()


class Cut(BaseException):
    """The process was killed, or a call failed, between two steps."""


class House:
    """The API's and a worker's side on one database and one folder, either of which may be cut off at each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, StillClock()
        (folder / "data" / "tmp").mkdir(parents=True)
        given = Settings(
            data_dir=folder / "data", lease_seconds=LEASE_SECONDS, delete_grace_seconds=GRACE_SECONDS, max_attempts=2,
            min_free_bytes=0,
        )  # fmt: skip
        self.db, self.storage = fresh_database(folder / "data"), Storage(given.resolved_storage_url)
        self.context = Context(given, self.db, self.storage, EngineHandle(given), self.clock)
        self.supervisor = Supervisor(given, self._child, self.clock)
        self.supervisor.db, self.supervisor.storage = self.db, self.storage
        self.context.steady = self.supervisor.steady = lambda: True  # type: ignore[assignment]
        self.script: list[str] = []
        self.steps_left, self.dead, self.collects = -1, False, False
        self._write, self._put, self._delete = self.db.write, self.storage.put, self.storage.delete
        self.db.write = self._writing  # type: ignore[method-assign]
        self.storage.put = lambda source, key: self._stepped(self._put, source, key)  # type: ignore[method-assign]
        self.storage.delete = lambda prefix: self._stepped(self._delete, prefix)  # type: ignore[method-assign]

    # Where it is cut off -----------------------------------------------------------------------------
    def _step(self, *, locked: bool = False) -> None:
        if self.collects and not locked:
            self.collects = False
            _round(self.context, forgets=False)
            self.collects = True
        if self.steps_left == 0:
            self.steps_left = 0 if self.dead else -1  # who is dead does not clean up either
            raise Cut
        self.steps_left -= self.steps_left > 0

    def _stepped(self, call: Callable[..., Any], *given: Any) -> Any:
        self._step()
        done = call(*given)
        self._step()
        return done

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Session]:
        self._step()
        with self._write() as session:
            yield session
            self._step(locked=True)
        self._step()

    @contextlib.contextmanager
    def cut_after(self, steps: int | None, *, dead: bool) -> Iterator[None]:
        """What is done inside is cut off after so many steps, else another process collects between any two of them.

        `Conflict` is an answer like another.
        """
        self.steps_left, self.dead, self.collects = -1 if steps is None else steps, dead, steps is None
        with contextlib.suppress(Cut, Conflict):
            yield
        self.steps_left, self.collects = -1, False

    # What a worker does ------------------------------------------------------------------------------
    def work(self, script: list[str]) -> None:
        self.script = script
        place = self.folder / "work"
        try:
            self.supervisor.work_once(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _child(self, folder: Path) -> "Child":
        return Child(self, folder, list(self.script))

    # What must hold ----------------------------------------------------------------------------------
    def named(self) -> dict[str, str | None]:
        """Every key that a row names, and its hash where the row has one."""
        with self.db.read() as session:
            found: dict[str, str | None] = {row.storage_key: row.sha256 for row in session.scalars(select(Dataset))}
            found |= {row.storage_key: row.sha256 for row in session.scalars(select(Artifact))}
            for model in session.scalars(select(Model)):
                found |= {f"{model.storage_prefix}/{file}": None for file in model.files}
            for job in session.scalars(select(Job).where(Job.checkpoint_prefix.is_not(None))):
                found |= {f"{job.checkpoint_prefix}/{name}": None for name in CHECKPOINT}
        return found

    def files(self) -> set[str]:
        root = self.folder / "data" / "storage"
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

    def ids(self, table: Any) -> list[str]:
        with self.db.read() as session:
            return list(session.scalars(select(table.id).order_by(table.id)))


CHECKPOINT = ("state.json", "weights.bin")
LEFT = ("predictions.csv", "metrics.json", "adapter/weights.bin")


class Child:
    """Says and does what its script has; other processes are at work meanwhile."""

    def __init__(self, house: House, folder: Path, script: list[str]) -> None:
        self.house, self.folder, self.script = house, folder, script
        self.killed, self.n = False, 0

    def messages(self, wait_seconds: float) -> Iterator[dict[str, Any]]:
        if self.script and not self.killed:
            yield from getattr(self, f"_{self.script.pop(0)}")()

    def ended(self) -> int | None:
        dies = -9 if self.killed or self.n < 0 else 0
        return dies if self.killed or not self.script else None

    def ask_to_stop(self) -> None:
        pass

    def kill(self) -> None:
        self.killed = self.killed or self.ended() is None

    def _checkpoint(self) -> Iterator[dict[str, Any]]:
        self.n += 1
        folder = self.folder / "checkpoints" / f"at-{self.n}"
        for name in CHECKPOINT:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{self.n} {name}")
        yield {"type": "checkpoint", "folder": str(folder)}

    def _result(self) -> Iterator[dict[str, Any]]:
        for name in LEFT:
            file = self.folder / "out" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name * 3)
        manifest = {"base_model": "minilm", "base_revision": "r", "labels": ["a", "b"]}
        (self.folder / "out" / "adapter" / "manifest.json").write_text(json.dumps(manifest))
        figures = {"accuracy": 0.9, "macro_f1": 0.8, "on": "test", "model_id": None}
        models = [{"method": "lora", "folder": "out/adapter"}]
        yield {"type": "result", "summary": {"headline": "x", "methods": {"lora": figures}}, "models": models}

    def _error(self) -> Iterator[dict[str, Any]]:
        yield {"type": "error", "code": "invalid_data", "message": "x", "hint": None}

    def _dies(self) -> Iterator[dict[str, Any]]:
        self.n, self.script = -1, []
        yield from ()

    def _cancelled(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(Conflict), self.house.db.write() as session:
            for job in session.scalars(select(Job).where(Job.status == "running")):
                jobs.cancel(session, job.id, self.house.clock())
        yield from ()

    def _sleeps(self) -> Iterator[dict[str, Any]]:
        """The machine slept past its lease, and past the grace, and others were awake."""
        self.house.clock.advance(LEASE_SECONDS + GRACE_SECONDS + 1)
        _round(self.house.context)
        yield from ()

    def _collected(self) -> Iterator[dict[str, Any]]:
        _round(self.house.context)
        yield from ()


# Mostly nothing is cut off: else little ever gets far enough to be harmed.
STEPS = st.one_of(st.none(), st.none(), st.none(), st.integers(0, 24))
ENDS = st.sampled_from(["result", "error", "dies", "result", "result"])
REMOVERS: dict[str, tuple[Any, Callable[..., None]]] = {
    "dataset": (Dataset, catalog.remove_dataset), "job": (Job, jobs.remove), "model": (Model, catalog.remove_model)
}  # fmt: skip
ON_THE_WAY = st.lists(st.sampled_from(["checkpoint"] * 4 + ["cancelled", "sleeps", "collected"]), max_size=3)


class Machine(RuleBasedStateMachine):
    """Two people, a worker, the housekeeping and the clock, in any order."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tuneproof-collection-"))
        self.house = House(self.folder)
        self.uploads = 0

    @rule(steps=STEPS, dead=st.booleans())
    def upload(self, steps: int | None, dead: bool) -> None:
        self.uploads, n = self.uploads + 1, len(self.house.ids(Dataset))
        table = "text,label\n" + "".join(f"text {self.uploads} {i},{'ab'[i % 2]}\n" for i in range(20))
        sent = UploadFile(io.BytesIO(table.encode()), filename="x.csv")
        with self.house.cut_after(steps, dead=dead):
            datasets.store(self.house.context, sent, DatasetForm(), self._submitted)
        assert steps is not None or len(self.house.ids(Dataset)) == n + 1, "it was collected before a row named it"

    def _submitted(self, session: Session, dataset: Dataset) -> None:
        spec = JobSpec(name="x").model_dump(exclude={"model", "metadata", "dataset_id", "webhook_url"})
        now = self.house.clock()
        jobs.submit(session, kind="experiment", name="x", dataset_id=dataset.id, spec=spec, metadata={}, now=now)

    @rule(way=ON_THE_WAY, end=ENDS, steps=STEPS, dead=st.booleans())
    def work(self, way: list[str], end: str, steps: int | None, dead: bool) -> None:
        with self.house.cut_after(steps, dead=dead):
            self.house.work([*way, end])

    @rule(way=ON_THE_WAY, end=ENDS)
    def upload_and_work(self, way: list[str], end: str) -> None:
        """Uncut, and often: else there is little to be harmed."""
        self.upload(None, dead=False)
        self.work(way, end, None, dead=False)

    @rule(what=st.sampled_from([jobs.cancel, jobs.retry]), which=st.integers(0, 9), steps=STEPS)
    def ask(self, what: Callable[..., Any], which: int, steps: int | None) -> None:
        self._on(Job, which, steps, lambda session, id_: what(session, id_, self.house.clock()))

    @rule(what=st.sampled_from(sorted(REMOVERS)), which=st.integers(0, 9), steps=STEPS)
    def delete(self, what: str, which: int, steps: int | None) -> None:
        table, remove = REMOVERS[what]
        now, grace = self.house.clock(), self.house.context.grace
        self._on(table, which, steps, lambda session, id_: remove(session, id_, now, grace))

    def _on(self, table: Any, which: int, steps: int | None, change: Callable[[Session, str], Any]) -> None:
        ids = self.house.ids(table)
        if ids:
            with self.house.cut_after(steps, dead=True), self.house.db.write() as session:
                change(session, ids[which % len(ids)])

    @rule(seconds=st.sampled_from([1, LEASE_SECONDS + 1, GRACE_SECONDS + 1, A_DAY + 1]))
    def time_goes_on(self, seconds: float) -> None:
        self.house.clock.advance(seconds)
        _round(self.house.context)

    @rule(steps=STEPS, dead=st.booleans())
    def collect(self, steps: int | None, dead: bool) -> None:
        with self.house.cut_after(steps, dead=dead):
            _round(self.house.context)

    @invariant()
    def what_a_row_names_is_there(self) -> None:
        for key, sha256 in self.house.named().items():
            content = b"".join(self.house.storage.chunks(key))
            assert content
            assert sha256 in (None, hashlib.sha256(content).hexdigest()), key

    def teardown(self) -> None:
        try:
            self._leave()
        finally:
            self.house.db.close()
            self.house.supervisor.db.close()
            shutil.rmtree(self.folder)

    def _leave(self) -> None:
        """Everything is deleted, and a day goes by: nothing is left."""
        house = self.house
        house.clock.advance(LEASE_SECONDS + 1)
        for job_id in house.ids(Job):
            with contextlib.suppress(Conflict), house.db.write() as session:
                jobs.cancel(session, job_id, house.clock())
        house.clock.advance(LEASE_SECONDS + 1)
        _round(house.context)
        for table, remove in REMOVERS.values():
            for id_ in house.ids(table):
                with house.db.write() as session:
                    remove(session, id_, house.clock(), house.context.grace)
        house.clock.advance(A_DAY + GRACE_SECONDS + 1)
        while house.ids(Garbage):
            _round(house.context)
        assert house.files() == set()


def run(examples: int, steps: int) -> None:
    quick = settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
    )  # fmt: skip
    # Nothing here survives a power cut anyway.
    with patch.object(os, "fsync"), patch.object(supervisor_module, "_STATUS_SECONDS", 0.0):
        run_state_machine_as_test(Machine, settings=quick)


def test_what_a_row_names_is_there_and_nothing_else_stays() -> None:
    run(examples=12, steps=25)


@pytest.mark.more
def test_what_a_row_names_is_there_and_nothing_else_stays_however_long_it_goes_on() -> None:
    run(examples=30, steps=45)
