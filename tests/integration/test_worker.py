"""The supervisor: with children that follow a script here, and with real ones (marked `more`) at the end."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, select
from sqlalchemy.exc import OperationalError

from service.core import logs
from service.core.clock import Steadiness
from service.core.errors import DISK_FULL, StorageUnavailable
from service.core.settings import Settings
from service.core.spec import JobSpec
from service.db import catalog, garbage, jobs
from service.db.engine import Database
from service.db.models import Artifact, Dataset, Event, Garbage, Job, Model
from service.storage import Storage
from tests.databases import database_url, fresh_database
from tests.rows import GRACE, START, Steady, StillClock, add_dataset, add_job, read_job
from tests.tiny import BERT, labelled_texts
from tests.waiting import until
from worker import supervisor as supervisor_module
from worker.scratch import own_folder
from worker.supervisor import Supervisor

TABLE = b"text,label\nhello,a\n"
SUMMARY = {
    "headline": "lora wins",
    "methods": {"lora": {"accuracy": 0.9, "macro_f1": 0.8, "on": "test", "model_id": None}},
}
POINTS = {"rows": 10, "points": [[0.0, 10, 8]]}
Step = dict[str, Any] | Callable[["FakeChild"], Any]


class FakeChild:
    """Follows a script: says a message or does something at each look, then ends with its status."""

    def __init__(self, folder: Path, steps: list[Step], status: int | None) -> None:
        self.folder, self.steps, self.status = folder, list(steps), status
        self.asked = self.killed = False

    def messages(self, wait_seconds: float) -> Iterator[dict[str, Any]]:
        if self.steps and not self.killed:
            step = self.steps.pop(0)
            if callable(step):
                step(self)
            else:
                yield dict(step)

    def ended(self) -> int | None:
        if self.killed:
            return -9
        return None if self.steps else self.status

    def ask_to_stop(self) -> None:
        self.asked = True

    def kill(self) -> None:
        self.killed = self.killed or self.ended() is None


class Bench:
    """A supervisor on a fresh database, whose children are scripts, one per attempt."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        fresh_database(folder).close()
        values: dict[str, Any] = {"data_dir": folder, "lease_seconds": 30, "max_attempts": 3}
        values |= {"database_url": database_url(folder)} | settings
        self.folder, self.clock = folder, StillClock()
        self.scripts: list[tuple[list[Step], int | None]] = []
        self.children: list[FakeChild] = []
        self.supervisor = Supervisor(Settings(**values), self.launch, self.clock)
        self.supervisor.steady = Steady()
        self.db, self.storage = self.supervisor.db, self.supervisor.storage
        key = "datasets/ds/file"
        with (folder / "table.csv").open("wb+") as file:
            file.write(TABLE)
            file.seek(0)
            self.storage.put(file, key)
        self.dataset_id = add_dataset(self.db, storage_key=key)
        self.job_id = add_job(self.db, self.dataset_id)

    def launch(self, folder: Path) -> FakeChild:
        steps, status = self.scripts.pop(0)
        self.children.append(FakeChild(folder, steps, status))
        return self.children[-1]

    def attempt(self, *steps: Step, status: int | None = 0) -> Job:
        """One more attempt, by this script; gives the job as it is then."""
        self.scripts.append((list(steps), status))
        assert self.supervisor.work_once(self.folder / "work")
        return self.job

    @property
    def job(self) -> Job:
        return read_job(self.db, self.job_id)

    def cancel(self, _child: FakeChild | None = None) -> None:
        with self.db.write() as session:
            jobs.cancel(session, self.job_id, self.clock())

    def lose_lease(self, _child: FakeChild) -> None:
        """The machine slept for longer than the lease, and somebody noticed."""
        now = self.clock.advance(31)
        assert jobs.reap(self.db, now, 3, GRACE) == 1

    def rows(self, table: Any) -> list[Any]:
        with self.db.read() as session:
            return list(session.scalars(select(table)))

    def files(self) -> set[str]:
        """Where files lie once what is garbage by now is deleted."""
        for _id, prefix in garbage.due(self.db, self.clock()):
            self.storage.delete(prefix)
        root = self.folder / "storage"
        return {path.relative_to(root).parts[0] for path in root.rglob("*") if path.is_file()}

    def messages(self) -> list[str]:
        return [event.message for event in self.rows(Event)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(supervisor_module, "_STATUS_SECONDS", 0.0)
    monkeypatch.setattr(supervisor_module, "_AWAY_SECONDS", 0.0)
    made = Bench(tmp_path)
    yield made
    made.db.close()


def leaves(*names: str) -> Callable[[FakeChild], None]:
    """Writes what an experiment leaves."""

    def write(child: FakeChild) -> None:
        for name in names or (
            "metrics.json",
            "predictions.csv",
            "flips.csv",
            "report.html",
            "adapter/adapter_model.safetensors",
        ):
            file = child.folder / "out" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode())
        manifest = {"base_model": "minilm", "base_revision": "sha256:0", "labels": ["a", "b"], "calibration": POINTS}
        (child.folder / "out" / "adapter").mkdir(parents=True, exist_ok=True)
        (child.folder / "out" / "adapter" / "manifest.json").write_text(json.dumps(manifest))

    return write


AWAY = OperationalError("COMMIT", None, Exception("server closed the connection unexpectedly"))
RESULT = {"type": "result", "summary": SUMMARY, "models": [{"method": "lora", "folder": "out/adapter"}]}


def progress(stage: str, fraction: float) -> dict[str, Any]:
    return {"type": "progress", "stage": stage, "fraction": fraction, "message": stage, "eta_seconds": 1.0}


# How an attempt ends ------------------------------------------------------------------------------
def test_a_job_that_succeeds_is_published_once(bench: Bench) -> None:
    job = bench.attempt(progress("train", 0.5), leaves(), RESULT)
    assert (job.status, job.stage, job.progress_fraction, job.attempt) == ("succeeded", "publish", 1.0, 1)
    [model] = bench.rows(Model)
    assert (model.method, model.labels, model.version) == ("lora", ["a", "b"], 1)
    assert model.metrics == {"accuracy": 0.9, "macro_f1": 0.8}
    assert model.calibration == POINTS
    assert job.model_id == model.id
    assert job.summary is not None
    assert job.summary["methods"]["lora"]["model_id"] == model.id
    for file in model.files:
        assert b"".join(bench.storage.chunks(f"{model.storage_prefix}/{file}"))
    found = {artifact.name: artifact.holds_texts for artifact in bench.rows(Artifact)}
    assert found == {
        "metrics.json": False, "predictions.csv": True, "flips.csv": True, "report.html": True,
        "adapter/manifest.json": False, "adapter/adapter_model.safetensors": False,
    }  # fmt: skip
    assert b"".join(bench.storage.chunks(bench.rows(Artifact)[0].storage_key))
    assert not bench.children[0].folder.exists()
    assert not bench.supervisor.work_once(bench.folder / "work")


@pytest.mark.parametrize("way", ["fetch", "put"])
def test_the_lease_is_kept_while_a_large_file_is_copied(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, renewed = Bench(tmp_path, lease_seconds=2), threading.Event()
    copy, renew = getattr(bench.storage, way), jobs.renew

    def slowly(*given: Any) -> Any:
        renewed.clear()
        assert renewed.wait(30)
        return copy(*given)

    def noted(*given: Any) -> str:
        status = renew(*given)
        renewed.set()
        return status

    monkeypatch.setattr(bench.storage, way, slowly)
    monkeypatch.setattr(supervisor_module.jobs, "renew", noted)

    def leave_a_file(child: FakeChild) -> None:
        (child.folder / "out").mkdir()
        (child.folder / "out" / "metrics.json").write_text("{}")

    done = {"type": "result", "summary": {"headline": "fine", "methods": {}}, "models": []}
    assert bench.attempt(leave_a_file, done).status == "succeeded"
    bench.db.close()


def test_a_child_finds_the_dataset_and_the_job_in_its_folder(bench: Bench) -> None:
    seen: dict[str, Any] = {}

    def look(child: FakeChild) -> None:
        seen["dataset"] = (child.folder / "dataset").read_bytes()
        seen["job"] = json.loads((child.folder / "job.json").read_text())

    bench.attempt(look, {"type": "error", "code": "invalid_data", "message": "x", "hint": None}, status=1)
    assert seen["dataset"] == TABLE
    assert seen["job"]["job_id"] == bench.job_id
    assert seen["job"]["spec"] == bench.job.spec
    assert seen["job"]["dataset"]["id"] == bench.dataset_id
    assert seen["job"]["table"]["text_column"] == "text"
    assert set(seen["job"]) == {
        "job_id", "spec", "table", "dataset", "models_dir", "serve_dtype", "checkpoint_seconds", "endpoint"
    }  # fmt: skip
    assert seen["job"]["endpoint"] is None


def test_a_child_is_told_the_endpoint_its_job_names_and_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMED_KEY", "sk-hidden")
    endpoints = {
        name: {"base_url": f"http://{name}.local/v1", "model": name, "api_key_env": "NAMED_KEY"}
        for name in ("named", "other")
    }
    bench.supervisor.settings = Settings(data_dir=bench.folder, prompt_endpoints=endpoints)
    with bench.db.write() as session:
        job = jobs.get(session, bench.job_id)
        job.spec = job.spec | {"baseline": job.spec["baseline"] | {"prompt_model": "remote:named"}}
    seen: list[str] = []
    bench.attempt(lambda child: seen.append((child.folder / "job.json").read_text()), status=1)
    assert json.loads(seen[0])["endpoint"]["base_url"] == "http://named.local/v1"
    assert json.loads(seen[0])["endpoint"]["api_key_env"] == "NAMED_KEY"
    assert "sk-hidden" not in seen[0]
    assert "other" not in seen[0]
    assert bench.job.spec["baseline"]["prompt_model"] == "remote:named"
    assert "named.local" not in json.dumps(bench.job.spec)


def test_what_a_child_says_is_seen_while_it_runs(bench: Bench) -> None:
    seen: list[Any] = []
    spec = bench.job.spec | {"base_model": "minilm", "model": None, "dataset_id": "ds_0", "metadata": {}}
    bench.attempt(
        {"type": "spec", "spec": spec},
        {"type": "event", "level": "warning", "kind": "message", "message": "beware", "data": {"n": 1}},
        progress("baseline", 0.25),
        lambda _child: seen.append(bench.job),
        leaves(), RESULT,
    )  # fmt: skip
    [job] = seen
    assert (job.status, job.stage, job.progress_fraction, job.eta_seconds) == ("running", "baseline", 0.25, 1.0)
    assert job.spec["base_model"] == "minilm"
    assert set(job.spec) == set(bench.job.spec)
    assert "dataset_id" not in job.spec
    assert "beware" in bench.messages()


def test_a_child_that_is_killed_each_time_is_retried_and_then_given_up(bench: Bench) -> None:
    for attempt, status in ((1, "queued"), (2, "queued"), (3, "failed")):
        job = bench.attempt(progress("train", 0.3), status=-9)
        assert (job.status, job.attempt, job.failures) == (status, attempt, attempt)
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "signal 9" in job.error["message"]
    assert sum("signal 9" in message for message in bench.messages()) == 3
    assert bench.rows(Artifact) == bench.rows(Model) == []


def test_a_child_that_is_killed_twice_and_then_succeeds_is_published_once(bench: Bench) -> None:
    bench.attempt(leaves(), status=-9)
    bench.attempt(leaves(), status=-11)
    job = bench.attempt(leaves(), RESULT)
    assert (job.status, job.attempt) == ("succeeded", 3)
    assert len(bench.rows(Model)) == 1


def test_a_child_that_somebody_else_told_to_stop_is_retried(bench: Bench) -> None:
    job = bench.attempt(status=os.EX_TEMPFAIL)
    assert (job.status, job.failures) == ("queued", 1)


def test_a_typed_error_fails_the_job_with_its_code_and_is_not_retried(bench: Bench) -> None:
    error = {"code": "model_unavailable", "message": "It cannot be had.", "hint": "Put its files there."}
    job = bench.attempt({"type": "error"} | error, status=1)
    assert (job.status, job.error, job.failures, job.attempt) == ("failed", error, 0, 1)
    assert not bench.supervisor.work_once(bench.folder / "work")


def test_a_child_that_breaks_without_a_word_fails_as_internal_and_no_text_reaches_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def broke(child: FakeChild) -> None:
        quoted = 'Traceback (most recent call last):\nValueError: a\n  File "private text", line 7, in private\n'
        ended = f'CRITICAL tuneproof: {logs.ENDED}\n  File "worker/run.py", line 7, in run\nValueError\n'
        (child.folder / "log.txt").write_text(quoted + ended)

    with caplog.at_level(logging.DEBUG):
        job = bench.attempt(broke, status=1)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "internal")
    assert "line 7, in run" in caplog.text
    assert "private" not in caplog.text + str(job.error) + str(bench.messages())


def test_a_worker_that_lost_its_lease_kills_its_child_and_publishes_nothing(bench: Bench) -> None:
    job = bench.attempt(leaves(), bench.lose_lease, progress("train", 0.9), RESULT)
    assert bench.children[0].killed
    assert (job.status, job.failures) == ("queued", 1)
    assert bench.rows(Artifact) == bench.rows(Model) == []
    job = bench.attempt(leaves(), RESULT)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert len(bench.rows(Model)) == 1


def test_a_lease_lost_while_publishing_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, puts = bench.storage.put, []

    def put(source: Any, key: str) -> Any:
        puts.append(key)
        if key.startswith("models/"):
            monkeypatch.setattr(bench.storage, "put", real)
            bench.lose_lease(bench.children[0])
        return real(source, key)

    monkeypatch.setattr(bench.storage, "put", put)
    job = bench.attempt(leaves(), RESULT)
    assert job.status == "queued"
    assert puts[-1].startswith("models/")
    assert bench.rows(Artifact) == bench.rows(Model) == []
    assert bench.files() == {"datasets"}
    assert bench.attempt(leaves(), RESULT).status == "succeeded"


def test_a_model_stays_whose_job_is_deleted_before_its_worker_knows_that_it_is_published(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the commit is lost with the database's server; when it is back, the job is gone."""
    real = jobs.publish

    def publish(*given: Any) -> None:
        real(*given)
        monkeypatch.setattr(jobs, "publish", real)
        with bench.db.write() as session:
            jobs.remove(session, bench.job_id, bench.clock(), GRACE)
        raise AWAY

    monkeypatch.setattr(jobs, "publish", publish)
    bench.scripts.append(([leaves(), RESULT], 0))
    assert bench.supervisor.work_once(bench.folder / "work")
    [made] = bench.rows(Model)
    assert bench.files() == {"datasets", "models"}
    assert b"".join(bench.storage.chunks(f"{made.storage_prefix}/manifest.json"))


@pytest.mark.parametrize("broken", [1, 2, 3, 4, 5])
def test_a_publish_that_breaks_at_any_file_leaves_bytes_that_are_collected(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """As by a full disk, or a power cut between the files: the put says nothing and no handler of ours runs."""
    real, puts = bench.storage.put, []

    def put(source: Any, key: str) -> Any:
        puts.append(key)
        if len(puts) == broken:
            bench.storage.put = real  # type: ignore[method-assign]
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, key)

    monkeypatch.setattr(bench.storage, "put", put)
    failed = bench.attempt(leaves(), RESULT)
    assert failed.error == DISK_FULL
    assert bench.rows(Artifact) == bench.rows(Model) == []
    with bench.db.write() as session:
        jobs.retry(session, bench.job_id, bench.clock())
    assert bench.attempt(leaves(), RESULT).status == "succeeded"
    named = {artifact.storage_key for artifact in bench.rows(Artifact)}
    [made] = bench.rows(Model)
    for _id, prefix in garbage.due(bench.db, bench.clock.now + timedelta(days=1, seconds=1)):
        bench.storage.delete(prefix)
    stored = {path for path in (bench.folder / "storage").rglob("*") if path.is_file()}
    keys = {path.relative_to(bench.folder / "storage").as_posix() for path in stored}
    assert keys == named | {f"{made.storage_prefix}/{name}" for name in made.files} | {"datasets/ds/file"}


def test_a_job_that_is_cancelled_ends_cancelled_and_its_child_was_asked_first(bench: Bench) -> None:
    def leave(child: FakeChild) -> None:
        if not child.asked:
            child.steps.insert(0, leave)
        child.status = os.EX_TEMPFAIL

    job = bench.attempt(progress("train", 0.5), bench.cancel, leave, status=None)
    assert bench.children[0].asked
    assert (job.status, job.lease_token) == ("cancelled", None)
    assert bench.rows(Artifact) == bench.rows(Model) == []


def test_a_child_that_does_not_listen_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_CANCEL_SECONDS", 0.0)
    monkeypatch.setattr(supervisor_module, "_STOP_SECONDS", 0.0)

    def deaf(child: FakeChild) -> None:
        child.steps.insert(0, deaf)

    job = bench.attempt(bench.cancel, deaf, status=None)
    assert bench.children[0].killed
    assert job.status == "cancelled"


def test_a_cancel_that_comes_after_the_result_still_wins(bench: Bench) -> None:
    def result_then_cancel(child: FakeChild) -> None:
        leaves()(child)
        real = bench.storage.put

        def put(source: Any, key: str) -> Any:
            bench.storage.put = real  # type: ignore[method-assign]
            bench.cancel()
            return real(source, key)

        bench.storage.put = put  # type: ignore[method-assign]

    job = bench.attempt(result_then_cancel, RESULT)
    assert job.status == "cancelled"
    assert bench.rows(Artifact) == bench.rows(Model) == []
    assert bench.files() == {"datasets"}


def test_a_worker_that_is_stopped_gives_its_job_back_without_a_failure(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tuneproof.worker")

    def leave(child: FakeChild) -> None:
        if not child.asked:
            child.steps.insert(0, leave)
        child.status = os.EX_TEMPFAIL

    job = bench.attempt(progress("train", 0.5), lambda _: bench.supervisor.stop.set(), leave, status=None)
    assert bench.children[0].asked
    assert (job.status, job.failures, job.attempt, job.stage) == ("queued", 0, 1, None)
    assert "the job is given back, and goes on when the next one starts" in caplog.text
    assert "ended with status" not in caplog.text, "which reads as if somebody else had killed it"


def test_a_result_that_is_there_when_the_worker_is_stopped_is_published(bench: Bench) -> None:
    job = bench.attempt(leaves(), lambda _: bench.supervisor.stop.set(), RESULT)
    assert job.status == "succeeded"


def test_a_stop_and_a_cancel_at_once_end_the_job_cancelled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_STATUS_SECONDS", 60.0)  # the cancel is not seen in time

    def both(child: FakeChild) -> None:
        bench.cancel()
        bench.supervisor.stop.set()
        child.status = os.EX_TEMPFAIL

    assert bench.attempt(both, status=None).status == "cancelled"


def test_the_next_attempt_finds_the_checkpoint_of_the_one_before(bench: Bench) -> None:
    def checkpoint(child: FakeChild) -> None:
        folder = child.folder / "checkpoints" / "epoch-1"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        child.steps.insert(0, {"type": "checkpoint", "folder": str(folder)})

    seen: list[str] = []
    bench.attempt(checkpoint, status=-9)
    bench.attempt(
        lambda child: seen.append((child.folder / "checkpoints" / "epoch-1" / "state.json").read_text()), status=-9
    )
    assert seen == ["{}"]
    bench.attempt(leaves(), RESULT)
    assert [row.prefix for row in bench.rows(Garbage) if "checkpoints" in row.prefix] == [
        f"jobs/{bench.job_id}/checkpoints"
    ]


def part(number: int) -> Callable[[FakeChild], None]:
    """One more file in a folder that only grows."""

    def write(child: FakeChild) -> None:
        folder = child.folder / "checkpoints" / "parts"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.csv").write_text(f"part {number}")
        child.steps.insert(0, {"type": "checkpoint", "folder": str(folder)})

    return write


def parts_of(child: FakeChild) -> list[str]:
    return sorted(path.read_text() for path in (child.folder / "checkpoints" / "parts").iterdir())


def test_of_a_checkpoint_that_grows_every_part_is_stored_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, puts = bench.storage.put, []

    def put(source: Any, key: str) -> Any:
        puts.append(key.rpartition("/")[2])
        return real(source, key)

    monkeypatch.setattr(bench.storage, "put", put)
    bench.attempt(part(0), part(1), part(2), status=-9)
    assert puts == ["0.csv", "1.csv", "2.csv"]
    seen: list[list[str]] = []
    bench.attempt(lambda child: seen.append(parts_of(child)), part(3), status=-9)
    assert seen == [["part 0", "part 1", "part 2"]]
    assert puts[3:] == ["0.csv", "1.csv", "2.csv", "3.csv"]  # an attempt has a place of its own
    bench.attempt(leaves(), RESULT)
    assert len([row for row in bench.rows(Garbage) if "checkpoints" in row.prefix]) == 2


def test_a_lease_lost_at_a_later_part_leaves_the_parts_that_the_next_attempt_goes_on_from(bench: Bench) -> None:
    bench.attempt(part(0), bench.lose_lease, part(1))
    seen: list[list[str]] = []
    bench.attempt(lambda child: seen.append(parts_of(child)), leaves(), RESULT)
    assert "part 0" in seen[0]


def predicting(bench: Bench) -> Model:
    """The bench's job becomes one that predicts with a published model, whose files are there."""
    bench.attempt(leaves(), RESULT)
    [model] = bench.rows(Model)
    with bench.db.write() as session:
        spec = JobSpec(kind="predict", model=model.id).kept()
        job = jobs.submit(
            session, kind="predict", name="bulk", dataset_id=bench.dataset_id, spec=spec, metadata={}, now=START,
            model_id=model.id,
        )  # fmt: skip
        bench.job_id = job.id
    return model


def test_a_job_that_predicts_finds_its_model_and_keeps_naming_it(bench: Bench) -> None:
    model, seen = predicting(bench), []
    job = bench.attempt(
        lambda child: seen.extend(path.name for path in (child.folder / "model").iterdir()),
        leaves("predictions.csv"),
        {"type": "result", "summary": {"headline": "1 of 1 rows labelled."}, "models": []},
    )
    assert sorted(seen) == sorted(model.files)
    assert (job.status, job.model_id) == ("succeeded", model.id)
    found = {row.name: row.holds_texts for row in bench.rows(Artifact) if row.job_id == job.id}
    assert found["predictions.csv"]
    assert len(bench.rows(Model)) == 1


def test_a_job_whose_model_has_vanished_fails_as_invalid_data(bench: Bench) -> None:
    predicting(bench)
    with bench.db.write() as session:
        session.execute(delete(Model))
    assert bench.supervisor.work_once(bench.folder / "work")
    assert bench.job.error is not None
    assert (bench.job.error["code"], bench.job.error["message"]) == ("invalid_data", "The job's model is gone.")


def test_a_checkpoint_that_is_gone_again_is_passed_over(bench: Bench) -> None:
    job = bench.attempt({"type": "checkpoint", "folder": str(bench.folder / "none")}, leaves(), RESULT)
    assert job.status == "succeeded"


def test_a_job_whose_dataset_has_vanished_fails_as_invalid_data(bench: Bench) -> None:
    with bench.db.write() as session:
        session.execute(delete(Dataset))
    assert bench.supervisor.work_once(bench.folder / "work")
    assert bench.job.error is not None
    assert bench.job.error["code"] == "invalid_data"
    assert bench.children == []


def test_a_job_whose_file_is_not_in_the_storage_ends_at_once_and_says_what_may_differ(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.storage.delete("datasets/ds/file")
    assert bench.supervisor.work_once(bench.folder / "work")
    assert (bench.job.status, bench.job.attempt) == ("failed", 1)
    assert bench.job.error is not None
    assert bench.job.error["code"] == "internal"
    assert "TUNEPROOF_STORAGE_URL" in bench.job.error["hint"]
    assert "datasets/ds/file is not in the storage" in caplog.text


def test_a_worker_names_what_it_shares_and_warns_where_others_would_not_find_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(**given: Any) -> str:
        caplog.clear()
        caplog.set_level(logging.INFO, "tuneproof")
        worker = Supervisor(Settings(data_dir=tmp_path, **given))
        worker.stop.set()
        worker.run()
        worker.db.close()
        return caplog.text

    shared = {"database_url": "postgresql://me:secret@db/tuneproof?password=secret"}
    apart = said(**shared)
    assert "WARNING" in apart
    assert "TUNEPROOF_STORAGE_URL" in apart
    assert "database postgresql+psycopg://me:***@db/tuneproof; storage file:" in apart
    assert "secret" not in apart
    assert "WARNING" not in said()
    assert "WARNING" not in said(storage_url=f"file://{tmp_path}", **shared)


def test_a_worker_is_seen_and_takes_over_from_a_lost_one(bench: Bench) -> None:
    lost = jobs.claim(bench.db, "wrk_lost", START, 30)
    assert lost is not None
    assert not bench.supervisor.work_once(bench.folder / "work")
    with bench.db.read() as session:
        assert catalog.workers_seen(session, START) == [bench.supervisor.id]
    bench.clock.advance(31)
    job = bench.attempt(leaves(), RESULT)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 1)


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_clock_that_is_set_by_an_hour_costs_no_attempt(bench: Bench, seconds: int) -> None:
    """Another worker is at work and renews by the new time within its lease; a lost one is noticed after that."""
    ticks = [0.0]
    bench.supervisor.steady = Steadiness(bench.clock, 30, lambda: ticks[0])
    ticks[0] += 31
    bench.clock.advance(31)
    assert bench.supervisor.steady()
    at_work = jobs.claim(bench.db, "wrk_other", bench.clock(), 30)
    assert at_work is not None
    bench.clock.advance(seconds)
    assert not bench.supervisor.work_once(bench.folder / "work")
    assert (bench.job.status, bench.job.failures) == ("running", 0)
    jobs.renew(bench.db, at_work.lease, bench.clock(), 30)
    ticks[0] += 31
    bench.clock.advance(31)
    job = bench.attempt(leaves(), RESULT)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 1)


# While the database is away -----------------------------------------------------------------------
def once(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, before: Callable[[], Any] = lambda: None) -> None:
    """The next call of `place.name` finds the database away."""
    real, calls = getattr(place, name), []

    def away(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            return real(*given, **named)
        before()
        raise AWAY

    monkeypatch.setattr(place, name, away)


def test_a_sign_of_life_that_nobody_takes_costs_no_attempt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_due(_child: FakeChild) -> None:
        bench.supervisor._seen = float("-inf")
        once(monkeypatch, catalog, "saw_worker")

    job = bench.attempt(progress("train", 0.5), is_due, progress("train", 0.6), leaves(), RESULT)
    assert (job.status, job.failures) == ("succeeded", 0)


def test_a_database_that_goes_away_right_after_a_claim_costs_no_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jobs.claim

    def claim(*given: Any) -> Any:
        claimed = real(*given)
        once(monkeypatch, bench.db, "read")
        return claimed

    monkeypatch.setattr(jobs, "claim", claim)
    job = bench.attempt(leaves(), RESULT)
    assert (job.status, job.failures) == ("succeeded", 0)


def test_a_lease_renewed_after_an_outage_counts_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_STATUS_SECONDS", 0.0)
    monkeypatch.setattr(supervisor_module, "_AWAY_SECONDS", 0.0)
    bench, found = Bench(tmp_path, lease_seconds=2), []

    def renewed(child: FakeChild) -> None:
        if bench.clock() == START:  # not yet: a renewal is due once two thirds of a second have gone by
            child.steps.insert(0, renewed)
        else:
            found.append(bench.job.lease_expires_at)

    once(monkeypatch, jobs, "renew", lambda: bench.clock.advance(40))
    bench.attempt(renewed, leaves(), RESULT)
    assert found == [START + timedelta(seconds=42)]
    bench.db.close()


def test_an_outage_longer_than_a_child_may_be_silent_does_not_end_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks, silence = [0.0], bench.supervisor.settings.silence_seconds

    def outage(_child: FakeChild) -> None:
        once(monkeypatch, jobs, "status_under", lambda: ticks.append(ticks[-1] + silence + 1))

    monkeypatch.setattr(supervisor_module, "time", SimpleNamespace(monotonic=lambda: ticks[-1]))
    job = bench.attempt(progress("train", 0.5), outage, progress("train", 0.6), leaves(), RESULT)
    assert (job.status, job.failures) == ("succeeded", 0)
    assert len(ticks) == 2


def test_an_announcement_that_is_made_twice_holds_no_publishing_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = garbage.announce
    once(monkeypatch, garbage, "announce")
    first, calls = garbage.announce, []

    def announce(*given: Any) -> None:
        if not calls:
            real(*given)  # it arrives, and the answer to it does not
        calls.append(1)
        first(*given)

    monkeypatch.setattr(garbage, "announce", announce)
    job = bench.attempt(leaves(), RESULT)
    assert (job.status, job.failures) == ("succeeded", 0)
    assert not [row for row in bench.rows(Garbage) if row.prefix.startswith("models/")]


@pytest.mark.parametrize("when", ["staging", "training", "publishing"])
@pytest.mark.parametrize(
    ("why", "status", "failures"), [("cancel", "cancelled", 0), ("lose_lease", "queued", 1), ("stop", "queued", 0)]
)
def test_whoever_waits_for_the_storage_still_listens(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, when: str, why: str, status: str, failures: int
) -> None:
    tries: list[int] = []
    say = bench.supervisor.stop.set if why == "stop" else lambda: getattr(bench, why)(None)

    def away(*_given: Any) -> None:
        tries.append(1)
        if len(tries) == 3:
            say()
        if len(tries) > 5:
            raise AssertionError("it goes on asking")
        raise StorageUnavailable("The storage does not answer.")

    monkeypatch.setattr(bench.storage, "fetch" if when == "staging" else "put", away)
    monkeypatch.setattr(bench.storage, "delete", away)
    bench.scripts.append(([part(0), progress("train", 0.5)] if when == "training" else [leaves(), RESULT], None))
    assert bench.supervisor.work_once(bench.folder / "work")
    assert (bench.job.status, bench.job.failures) == (status, failures)
    assert all(child.killed or not child.steps for child in bench.children)


def test_just_started_nobody_is_sure_of_the_clock() -> None:
    """It may have been set right before, and those at work renew by the new time within a lease."""
    clock, ticks = StillClock(), [0.0]
    steady = Steadiness(clock, 30, lambda: ticks[0])
    assert not steady()
    ticks[0] += 31
    clock.advance(31)
    assert steady()


def test_a_slow_copy_is_not_taken_for_a_child_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, real = Bench(tmp_path, silence_seconds=0.2), Storage.fetch

    def slow(storage: Storage, key: str, target: Path) -> None:
        threading.Event().wait(0.3)
        real(storage, key, target)

    monkeypatch.setattr(Storage, "fetch", slow)
    assert bench.attempt(leaves(), RESULT).status == "succeeded"
    bench.db.close()


@pytest.mark.parametrize(("why", "status"), [("stop", "queued"), ("cancel", "cancelled")])
def test_a_full_disk_does_not_overrule_who_stops_the_worker_or_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, why: str, status: str
) -> None:
    def full(_child: FakeChild) -> None:
        bench.cancel() if why == "cancel" else bench.supervisor.stop.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    job = bench.attempt(full)
    assert (job.status, job.failures, job.error) == (status, 0, None)


def test_a_child_that_says_nothing_for_too_long_is_ended_and_its_attempt_is_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, silence_seconds=0.05)

    def hang(child: FakeChild) -> None:
        if child.killed:
            child.status = -9
        else:
            child.steps.insert(0, hang)

    job = bench.attempt(progress("train", 0.5), hang, status=None)
    assert (job.status, job.failures) == ("queued", 1)
    assert bench.messages()[-1] == (
        "attempt 1 ended: its process had said nothing for 0.05 s and was ended; queued again"
    )
    bench.db.close()


def test_a_worker_that_stumbles_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, poll_seconds=0.01)
    calls: list[int] = []

    def work_once(_folder: Path) -> bool:
        calls.append(1)
        if len(calls) == 3:
            bench.supervisor.stop.set()
        raise OSError("the database is away")

    monkeypatch.setattr(bench.supervisor, "work_once", work_once)
    bench.supervisor.run()
    assert len(calls) == 3
    bench.db.close()


def test_scratch_of_dead_workers_is_removed_and_that_of_living_ones_kept(tmp_path: Path) -> None:
    root = tmp_path / "work"
    (root / "wrk_dead").mkdir(parents=True)
    (root / "wrk_dead" / "lock").touch()
    (root / "wrk_dead" / "texts.csv").write_text("private")
    with own_folder(root, "wrk_living"):
        with own_folder(root, "wrk_new") as own:
            assert sorted(path.name for path in root.iterdir()) == ["lock", "wrk_living", "wrk_new"]
            (own / "texts.csv").write_text("private")
        assert sorted(path.name for path in root.iterdir()) == ["lock", "wrk_living"]
    assert [path.name for path in root.iterdir()] == ["lock"]


# Real processes -----------------------------------------------------------------------------------
class Workshop:
    """An API in this process, and real workers beside it on the same data."""

    def __init__(self, client: TestClient, data_dir: Path, models_dir: Path) -> None:
        self.client, self.data_dir, self.models_dir = client, data_dir, models_dir
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self) -> subprocess.Popen[bytes]:
        given = {
            "TUNEPROOF_DATA_DIR": str(self.data_dir), "TUNEPROOF_MODELS_DIR": str(self.models_dir),
            "TUNEPROOF_LEASE_SECONDS": "5", "TUNEPROOF_POLL_SECONDS": "0.1", "OMP_NUM_THREADS": "1",
            "TUNEPROOF_SERVE_DTYPE": "fp32",
        }  # fmt: skip
        with (self.data_dir / "worker.log").open("ab") as log:
            self.workers.append(
                subprocess.Popen([sys.executable, "-P", "-m", "worker"], env=os.environ | given, stderr=log)
            )
        return self.workers[-1]

    def submit(self, n_rows: int = 400, **spec: Any) -> str:
        texts, labels = labelled_texts(n_rows)
        table = "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
        form = {"spec": json.dumps({"base_model": BERT, "train": {"max_length": 32}} | spec)}
        answer = self.client.post("/jobs", files={"file": ("t.csv", table.encode())}, data=form)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return self.client.get(f"/jobs/{job_id}").json()  # type: ignore[no-any-return]

    def reached(self, job_id: str, stage: str, attempt: int = 1, *, checkpoint: bool = False) -> dict[str, Any]:
        """The job once it stands in that stage of that attempt, after a checkpoint of this attempt if asked."""
        db: Database = self.client.app.state.context.db  # type: ignore[attr-defined]

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            assert not job["terminal"], job
            kept = read_job(db, job_id).checkpoint_prefix or ""
            there = (job["stage"], job["attempt"]) == (stage, attempt)
            return job if there and (not checkpoint or f"/{attempt}-" in kept) else None

        return until(look, 120, f"stage {stage} of attempt {attempt}")

    def ended(self, job_id: str) -> dict[str, Any]:
        return until(lambda: job if (job := self.job(job_id))["terminal"] else None, 200, "the job ends")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def workshop(tmp_path: Path, tiny_models: Path) -> Iterator[Workshop]:
    from service.core.clock import utc_now
    from tests.integration.conftest import make_app

    app = make_app(tmp_path / "data", clock=utc_now, models_dir=tiny_models)
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        made = Workshop(client, tmp_path / "data", tiny_models)
        yield made
        for worker in made.workers:
            if worker.poll() is None:
                worker.terminate()
            worker.wait(30)


LONG = {"kind": "train", "train": {"max_length": 32, "epochs": 60, "early_stopping_patience": 0, "learning_rate": 1e-4}}


@pytest.mark.more
def test_a_worker_killed_twice_in_the_middle_of_training_still_makes_one_model(workshop: Workshop) -> None:
    job_id = workshop.submit(**LONG)
    for attempt in (1, 2):
        worker = workshop.worker()
        workshop.reached(job_id, "train", attempt, checkpoint=True)
        worker.kill()
        worker.wait()
    workshop.worker()
    job = workshop.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 3), job
    assert [model["method"] for model in workshop.client.get("/models").json()["data"]] == ["lora"]
    events = workshop.client.get(f"/jobs/{job_id}/events?limit=200").json()["data"]
    assert sum("no sign of life" in event["message"] for event in events) == 2
    metrics = workshop.client.get(f"/jobs/{job_id}/artifacts/metrics.json").json()
    assert metrics["training"]["epochs_run"] == 60


@pytest.mark.more
def test_a_cancel_takes_under_five_seconds_at_every_stage(workshop: Workshop) -> None:
    import time

    workshop.worker()
    for stage, spec in (
        ("prepare", LONG),
        ("baseline", {"base_model": "tiny-qwen3", "baseline": {"sample_size": 300}, "n_rows": 4000}),
        ("train", LONG),
    ):
        job_id = workshop.submit(**spec)
        workshop.reached(job_id, stage)
        asked = time.monotonic()
        assert workshop.client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelling"
        job = workshop.ended(job_id)
        assert (job["status"], job["stage"]) == ("cancelled", stage)
        assert time.monotonic() - asked < 5, stage
    assert workshop.client.get("/models").json()["data"] == []


@pytest.mark.more
@pytest.mark.parametrize("stage", ["prepare", "train"])
def test_a_child_whose_worker_was_killed_is_gone_within_two_seconds(workshop: Workshop, stage: str) -> None:
    job_id = workshop.submit(**LONG)
    worker = workshop.worker()
    workshop.reached(job_id, stage)
    [child] = until(lambda: children_of(worker.pid), 20, "the child runs")
    worker.kill()
    until(lambda: not alive(child), 2, "the child is gone")


@pytest.mark.more
def test_a_worker_that_is_asked_to_stop_gives_its_job_back_and_the_next_one_goes_on(workshop: Workshop) -> None:
    job_id = workshop.submit(**LONG)
    worker = workshop.worker()
    workshop.reached(job_id, "train", checkpoint=True)
    [child] = children_of(worker.pid)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert not alive(child)
    job = workshop.job(job_id)
    assert (job["status"], job["attempt"]) == ("queued", 1)
    assert read_job(workshop.client.app.state.context.db, job_id).failures == 0  # type: ignore[attr-defined]
    assert [path.name for path in (workshop.data_dir / "work").iterdir()] == ["lock"]
    workshop.worker()
    job = workshop.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    told = workshop.client.get(f"/jobs/{job_id}/events?limit=200").json()["data"]
    assert sum(event["message"].startswith("Training goes on from its checkpoint: epoch ") for event in told) == 1


@pytest.mark.more
def test_from_one_post_to_an_answer_of_predict(tmp_path: Path, tiny_models: Path) -> None:
    from tests.integration.test_predict import Serving, started

    app = started(tmp_path, tiny_models)
    from service.core.clock import utc_now

    app.state.context.clock = utc_now
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        workshop = Workshop(client, tmp_path / "data", tiny_models)
        worker = workshop.worker()
        try:
            job_id = workshop.submit(train={"max_length": 32, "epochs": 3})
            job = workshop.ended(job_id)
        finally:
            worker.terminate()
            worker.wait(30)
        assert job["status"] == "succeeded", job
        assert set(job["summary"]["methods"]) == {
            "majority", "tfidf_logreg", "embedding_logreg", "zero_shot_similarity", "lora"
        }  # fmt: skip
        names = {artifact["name"] for artifact in job["artifacts"]}
        assert {"metrics.json", "predictions.csv", "split.csv", "report.html", "manifest.json",
                "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
                "adapter/README.md"} <= names  # fmt: skip
        assert "auto" not in json.dumps({**job["spec"], "baseline": None})
        serving = Serving(client, tmp_path, tiny_models)
        for method in ("lora", "embedding_logreg"):
            model_id = job["summary"]["methods"][method]["model_id"]
            assert serving.answered(model_id).status_code == 200
            assert_serves_what_was_judged(client, job_id, method, model_id)


def assert_serves_what_was_judged(client: TestClient, job_id: str, method: str, model_id: str) -> None:
    """`/predict` gives the labels and confidences that stand in predictions.csv."""
    import csv
    import io

    rows = list(csv.DictReader(io.StringIO(client.get(f"/jobs/{job_id}/artifacts/predictions.csv").text)))
    answer = client.post("/predict", json={"model": model_id, "texts": [row["text"] for row in rows]}).json()
    for row, prediction in zip(rows, answer["predictions"], strict=True):
        assert prediction["label"] == row[method]
        assert prediction["confidence"] == pytest.approx(float(row[f"{method}_confidence"]), abs=1e-5)
