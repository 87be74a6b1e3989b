"""Publishing and uploading, broken at every write in turn: what is seen is the old state or the new one, whole."""

import contextlib
import hashlib
import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from service.core.clock import Steadiness
from service.core.settings import Settings
from service.db import garbage, jobs
from service.db.engine import Database
from service.db.models import Artifact, Dataset, Event, Job, Model
from service.main import _round
from tests.integration.conftest import LOOPBACK, api, make_app
from tests.integration.test_api_datasets import GOOD
from tests.integration.test_worker import RESULT, Bench, leaves, part
from tests.problems import problem_of
from tests.rows import Steady, StillClock, add_job
from tests.write_steps import Died, Fault, PowerCut, WriteSteps
from worker import supervisor as supervisor_module
from worker.supervisor import Supervisor

FAULTS: list[Fault] = ["died", "disk error", "disk full"]
HEAVY = [FAULTS[0], *(pytest.param(fault, marks=pytest.mark.more) for fault in FAULTS[1:])]
LEFT = {"metrics.json", "adapter/manifest.json"}
A_DAY = timedelta(days=1, seconds=1)


class Disturbed(Bench):
    """Attempts that keep a checkpoint and publish, broken somewhere, and those that go on after them."""

    def attempt_broken(self, steps: WriteSteps, fault: Fault, at: int) -> None:
        self.scripts = [([part(0), leaves("metrics.json"), RESULT], 0)]
        with steps.on(fault, at), contextlib.suppress(Died, OSError, OperationalError):
            self.supervisor.work_once(self.folder / "work")

    def go_on(self) -> None:
        """As an operator would, or the lease: another attempt, on a disk that is well again."""
        if self.job.status == "failed":
            with self.db.write() as session:
                jobs.retry(session, self.job_id, self.clock())
        self.clock.advance(31)
        self.supervisor.steady = Steady()
        if self.job.status != "succeeded":
            self.scripts = [([part(1), leaves("metrics.json"), RESULT], 0)]
            assert self.supervisor.work_once(self.folder / "work")

    def assert_old_or_new(self) -> None:
        job = self.job
        with self.db.read() as session:
            artifacts = list(session.scalars(select(Artifact).where(Artifact.job_id == job.id)))
            models = list(session.scalars(select(Model).where(Model.job_id == job.id)))
        if job.checkpoint_prefix is not None:
            [kept] = (self.folder / "storage" / job.checkpoint_prefix).iterdir()
            assert kept.read_text() == "part 0"
        if job.status != "succeeded":
            assert (artifacts, models, job.summary, job.model_id) == ([], [], None, None)
            return
        assert {artifact.name for artifact in artifacts} == LEFT
        for artifact in artifacts:
            stored = b"".join(self.storage.chunks(artifact.storage_key))
            assert hashlib.sha256(stored).hexdigest() == artifact.sha256
            assert len(stored) == artifact.size_bytes > 0
        [model] = models
        assert job.model_id == model.id
        assert job.summary is not None
        for name in model.files:
            assert b"".join(self.storage.chunks(f"{model.storage_prefix}/{name}"))

    def times_published(self) -> int:
        return sum((event.job_id, event.message) == (self.job_id, "succeeded") for event in self.rows(Event))

    def assert_nothing_is_left_over(self) -> None:
        for garbage_id, prefix in garbage.due(self.db, self.clock.now + A_DAY):
            self.storage.delete(prefix)
            garbage.collected(self.db, garbage_id)
        named = {artifact.storage_key for artifact in self.rows(Artifact)}
        named |= {f"{model.storage_prefix}/{name}" for model in self.rows(Model) for name in model.files}
        root = self.folder / "storage"
        stored = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        assert stored == named | {"datasets/ds/file"}


@pytest.mark.parametrize("fault", HEAVY)
def test_an_attempt_broken_at_any_write_shows_nothing_half_and_the_job_is_published_once_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(supervisor_module, "_STATUS_SECONDS", 0.0)
    steps, bench = WriteSteps(monkeypatch, tmp_path / "storage"), Disturbed(tmp_path)
    for at in itertools.count(1):
        bench.attempt_broken(steps, fault, at)
        try:
            bench.assert_old_or_new()
            bench.go_on()
            assert bench.job.status == "succeeded", bench.job.error
            bench.assert_old_or_new()
            assert bench.times_published() == 1
            bench.assert_nothing_is_left_over()
        except Exception as error:
            raise AssertionError(f"{fault} at {steps}") from error
        if not steps.struck:
            break
        bench.job_id = add_job(bench.db, bench.dataset_id)
    assert at > 60, "every folder, file, fsync, row and commit is a step"
    bench.db.close()


def test_a_reader_between_any_two_writes_sees_the_job_as_it_was_or_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By HTTP: what is listed can be read, and the status, the artifacts and the model come together."""
    bench = Disturbed(tmp_path)
    seen: list[tuple[bool, int, int]] = []
    steps = WriteSteps(monkeypatch, tmp_path / "storage")
    with api(tmp_path, fresh=False, clock=bench.clock) as client:

        def look() -> None:
            job = client.get(f"/jobs/{bench.job_id}").json()
            models = client.get("/models").json()["data"]
            for artifact in job["artifacts"]:
                read = client.get(f"/jobs/{bench.job_id}/artifacts/{artifact['name']}")
                assert hashlib.sha256(read.content).hexdigest() == artifact["sha256"]
            seen.append((job["status"] == "succeeded", len(job["artifacts"]), len(models)))

        steps.look = look
        bench.attempt_broken(steps, "died", 0)
        look()
    assert set(seen) == {(False, 0, 0), (True, len(LEFT), 1)}
    assert seen == sorted(seen)
    assert bench.job.status == "succeeded"
    bench.db.close()


# Uploads ------------------------------------------------------------------------------------------
class Uploading:
    """An API that takes uploads while its disk breaks."""

    def __init__(self, client: TestClient, clock: StillClock, folder: Path) -> None:
        self.client, self.clock, self.folder = client, clock, folder
        self.context = client.app.state.context  # type: ignore[attr-defined]

    def send(self, path: str) -> Any:
        """The answer, or nothing where the process died."""
        answer = self.client.post(path, files={"file": ("a.csv", GOOD)})
        return answer if "content-type" in answer.headers else None

    def found(self) -> list[int]:
        """How many datasets and jobs there are, each of them whole."""
        datasets = self.client.get("/datasets").json()["data"]
        with self.context.db.read() as session:
            for dataset in session.scalars(select(Dataset)):
                stored = b"".join(self.context.storage.chunks(dataset.storage_key))
                assert stored == GOOD
                assert hashlib.sha256(stored).hexdigest() == dataset.sha256
        made = self.client.get("/jobs").json()["data"]
        assert {job["dataset_id"] for job in made} <= {dataset["id"] for dataset in datasets}
        return [len(datasets), len(made)]

    def clear(self) -> None:
        """Deletes everything there is; nothing may be left in the storage then."""
        for kind in ("jobs", "datasets"):
            for row in self.client.get(f"/{kind}").json()["data"]:
                self.client.post(f"/jobs/{row['id']}/cancel")
                assert self.client.delete(f"/{kind}/{row['id']}").status_code == 204
        self.clock.now += A_DAY
        _round(self.context)
        assert [path for path in (self.folder / "storage").rglob("*") if path.is_file()] == []


@pytest.fixture
def uploading(tmp_path: Path) -> Uploading:
    """Not started, so each call has a loop of its own, which may end with it; and no housekeeping is counted."""
    clock = StillClock()
    client = TestClient(make_app(tmp_path / "data", clock=clock), client=LOOPBACK, raise_server_exceptions=False)
    return Uploading(client, clock, tmp_path / "data")


@pytest.mark.parametrize("path", ["/jobs", pytest.param("/datasets", marks=pytest.mark.more)])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_upload_broken_at_any_write_is_there_whole_or_not_at_all_and_never_acknowledged_in_vain(
    uploading: Uploading, monkeypatch: pytest.MonkeyPatch, fault: Fault, path: str
) -> None:
    steps, both = WriteSteps(monkeypatch, uploading.folder / "storage"), [1, int(path == "/jobs")]
    for at in itertools.count(1):
        with steps.on(fault, at):
            answer = uploading.send(path)
        try:
            found = uploading.found()
            # Where only the word of the commit was lost, it stands.
            assert found == both or (found == [0, 0] and steps.struck)
            if answer is not None and answer.is_success:
                assert found == both
            elif answer is not None:
                problem_of(answer, *((507, "low_disk") if fault == "disk full" else (500, "internal")))
            assert uploading.send(path).is_success
            assert uploading.found() == [have + new for have, new in zip(found, both, strict=True)]
            uploading.clear()
        except Exception as error:
            raise AssertionError(f"{fault} at {steps}") from error
        if not steps.struck:
            break
    assert at >= 15, "every folder, file, fsync, row and commit is a step"


# The disk before the row --------------------------------------------------------------------------
def named_by(connection: Any, folder: Path) -> set[Path]:
    """Every file that the rows name, as this transaction sees them."""
    keys = {row.storage_key for table in (Dataset, Artifact) for row in connection.execute(select(table.storage_key))}
    for prefix, files in connection.execute(select(Model.storage_prefix, Model.files)):
        keys |= {f"{prefix}/{name}" for name in files}
    found = {folder / "storage" / key for key in keys}
    for (prefix,) in connection.execute(select(Job.checkpoint_prefix).where(Job.checkpoint_prefix.is_not(None))):
        found |= {path for path in (folder / "storage" / prefix).rglob("*") if path.is_file()}
    return found


def watch_commits(db: Database, cut: PowerCut) -> tuple[set[Path], list[Path]]:
    """Files named by any commit; and those of them that the disk was not sure to hold when it came."""
    named: set[Path] = set()
    missing: list[Path] = []

    def before_commit(connection: Any) -> None:
        found = named_by(connection, cut.root)
        named.update(found)
        missing.extend(path for path in sorted(found) if not cut.keeps(path))

    event.listen(db.engine, "commit", before_commit)
    return named, missing


def test_what_a_published_row_names_was_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts, models and checkpoints, with every folder above them: a power cut after the commit loses none."""
    cut = PowerCut(monkeypatch, tmp_path)
    bench = Bench(tmp_path)
    named, missing = watch_commits(bench.db, cut)
    job = bench.attempt(part(0), part(1), leaves(), RESULT)
    assert job.status == "succeeded"
    assert missing == []
    kinds = {path.relative_to(tmp_path / "storage").parts[0] for path in named}
    assert kinds == {"datasets", "jobs", "models"}
    assert {"0.csv", "1.csv", "predictions.csv", "adapter_model.safetensors"} <= {path.name for path in named}
    bench.db.close()


@pytest.mark.parametrize("path", ["/datasets", "/jobs"])
def test_what_an_upload_names_was_on_the_disk_before_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    cut = PowerCut(monkeypatch, tmp_path / "data")
    with api(tmp_path / "data") as client:
        named, missing = watch_commits(client.app.state.context.db, cut)  # type: ignore[attr-defined]
        assert client.post(path, files={"file": ("a.csv", GOOD)}).is_success
    assert len(named) == 1
    assert missing == []


# One attempt publishes ----------------------------------------------------------------------------
def test_of_one_that_slept_before_its_commit_no_byte_is_served_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is stored, the lease runs out, another attempt publishes; then the first one wakes up."""
    bench = Disturbed(tmp_path)
    real, woke = jobs.publish, []

    def other(child: Any) -> None:
        leaves("metrics.json")(child)
        (child.folder / "out" / "metrics.json").write_text("of the second attempt")

    def publish(*given: Any) -> None:
        monkeypatch.setattr(supervisor_module.jobs, "publish", real)
        bench.lose_lease(bench.children[0])
        second = Supervisor(Settings(data_dir=tmp_path, lease_seconds=30), bench.launch, bench.clock)
        bench.scripts.append(([other, RESULT], 0))
        assert second.work_once(tmp_path / "second")
        second.db.close()
        woke.append(len([path for path in (tmp_path / "storage/models").rglob("*") if path.is_file()]))
        real(*given)

    monkeypatch.setattr(supervisor_module.jobs, "publish", publish)
    bench.attempt(leaves("metrics.json"), RESULT)
    assert woke == [2], "both had stored their model"
    assert (bench.job.status, bench.job.attempt) == ("succeeded", 2)
    bench.assert_old_or_new()
    with api(tmp_path, fresh=False, clock=bench.clock) as client:
        assert client.get(f"/jobs/{bench.job_id}/artifacts/metrics.json").text == "of the second attempt"
        assert len(client.get("/models").json()["data"]) == 1
    bench.assert_nothing_is_left_over()
    bench.db.close()


def test_a_dead_workers_job_is_taken_up_within_its_lease_and_one_poll(tmp_path: Path) -> None:
    """Both by the clock of the worker that waits for work; nothing else tells it."""
    bench = Bench(tmp_path, poll_seconds=1.5)
    supervisor, start = bench.supervisor, bench.clock()
    assert jobs.claim(bench.db, "wrk_dead", start, 30) is not None
    supervisor.steady = Steadiness(bench.clock, 30, lambda: bench.clock().timestamp())

    class Stop:
        asked = False
        is_set = lambda self: self.asked  # noqa: E731
        wait = staticmethod(bench.clock.advance)

    supervisor.stop = stop = Stop()  # type: ignore[assignment]
    taken: list[float] = []

    def take(_child: Any) -> None:
        taken.append((bench.clock.now - start).total_seconds())
        stop.asked = True

    bench.scripts = [([take, leaves(), RESULT], 0)]
    supervisor.run()
    [seconds] = taken
    assert 30 < seconds <= 30 + 1.5
    assert (bench.job.status, bench.job.failures) == ("succeeded", 1)
    bench.db.close()
