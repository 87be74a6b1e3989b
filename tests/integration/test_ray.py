"""Jobs on a Ray cluster of several raylets on this machine, some of which are killed. `make test-scale` runs it."""

import contextlib
import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient

from service.core.clock import utc_now
from tests.integration.conftest import api
from tests.ray_cluster import add_node, ray_cluster
from tests.waiting import until

pytest.importorskip("ray")
pytestmark = pytest.mark.scale
WORDS = {"bill": "invoice payment refund", "login": "password account locked", "parcel": "delivery box late"}
SPEC = {"kind": "train", "train": {"epochs": 4, "lora_dropout": 0, "precision": "fp32", "early_stopping_patience": 0}}
PLACES = Path(gettempdir()) / f"tuneproof-{os.getuid()}"


def table(times: int) -> str:
    rows = (
        f"{times} {i} {words.split()[i % 3]} about my {words.split()[(i + 1) % 3]},{label}\n"
        for i in range(24 * times)
        for label, words in WORDS.items()
    )
    return "text,label\n" + "".join(rows)


@dataclass
class House:
    """An API, a worker that starts its attempts on a cluster, and the cluster."""

    client: TestClient
    cluster: Any
    address: str
    folder: Path

    @contextlib.contextmanager
    def worker(self, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        given = {
            "DATA_DIR": str(self.folder), "LAUNCHER": "ray", "RAY_ADDRESS": self.address, "RAY_GPUS": "0",
            "LEASE_SECONDS": "10", "POLL_SECONDS": "0.2", "CHECKPOINT_SECONDS": "1",
        } | settings  # fmt: skip
        env = os.environ | {f"TUNEPROOF_{name}": value for name, value in given.items()}
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-P", "-m", "worker"], env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(40)

    def submit(self, rows: str, spec: dict[str, Any]) -> str:
        answer = self.client.post("/jobs", files={"file": ("a.csv", rows)}, data={"spec": json.dumps(spec)})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return self.client.get(f"/jobs/{job_id}").json()  # type: ignore[no-any-return]

    def ended(self, job_id: str, seconds: float = 240) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        return until(look, seconds, "the job has ended")

    def told(self, job_id: str) -> list[str]:
        with self.client.stream("GET", f"/jobs/{job_id}/events", headers={"accept": "text/event-stream"}) as stream:
            return [json.loads(line[6:])["message"] for line in stream.iter_lines() if line.startswith("data: ")]

    def artifact(self, job_id: str, name: str) -> bytes:
        return self.client.get(f"/jobs/{job_id}/artifacts/{name}").content

    def losses(self, job_id: str) -> list[float]:
        lines = map(json.loads, self.artifact(job_id, "training_log.jsonl").splitlines())
        return [line["train_loss"] for line in lines if "learning_rate" in line]

    def node_of(self, words: str) -> Any:
        """The node on which a process runs that was started with these words."""
        for node in self.cluster.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if words in " ".join(process.cmdline()):
                        return node
        return None

    def lose(self, node: Any) -> None:
        """A machine that is gone, and another in its place."""
        self.cluster.remove_node(node, allow_graceful=False)
        add_node(self.cluster, 1)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("ray") / "data"
    with api(folder, clock=utc_now) as client, ray_cluster(nodes=3, cpus=1) as (address, cluster):
        yield House(client, cluster, address, folder)


@pytest.fixture(scope="module")
def whole(house: House) -> str:
    """A job that nothing happened to."""
    with house.worker():
        job_id = house.submit(table(4), SPEC)
        job = house.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1), job
    assert scratch() == [], "a node keeps nothing of a job that has ended"
    return job_id


def scratch() -> list[Path]:
    return list(PLACES.glob("wrk_*"))


def a_checkpoint_is_kept(house: House, job_id: str) -> bool:
    kept = house.folder / "storage" / "jobs" / job_id / "checkpoints"
    return bool(list(kept.glob("*/step-[1-9]*/state.json")))


def test_a_node_that_is_lost_in_training_is_an_attempt_that_goes_on_from_its_checkpoint(
    house: House, whole: str
) -> None:
    with house.worker():
        job_id = house.submit(table(4), SPEC)
        until(lambda: a_checkpoint_is_kept(house, job_id), 120, "a checkpoint of its steps is kept")
        node = house.node_of("worker.child")
        assert node is not None
        house.lose(node)
        job = house.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job
    told = " ".join(house.told(job_id))
    assert "its process was ended by signal 9" in told
    assert "Training goes on from its checkpoint: epoch" in told
    assert house.artifact(job_id, "predictions.csv") == house.artifact(whole, "predictions.csv")
    print("\ntraining: 1 node killed, 1 attempt lost, 0 jobs lost, predictions as undisturbed")


def test_two_processes_on_two_nodes_train_as_one_does_and_one_of_them_may_be_lost(house: House, whole: str) -> None:
    with house.worker(PROCESSES_PER_JOB="2"):
        job_id = house.submit(table(4), SPEC)
        until(lambda: a_checkpoint_is_kept(house, job_id), 120, "a checkpoint of its steps is kept")
        house.lose(house.node_of("worker.child"))
        job = house.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job
    assert house.losses(job_id) == pytest.approx(house.losses(whole), abs=1e-4)
    print("\ntwo ranks: 1 node killed, 1 attempt lost, 0 jobs lost, the loss curve of one rank to 1e-4")


def test_a_cancel_takes_under_five_seconds_and_leaves_nothing_on_the_node(house: House) -> None:
    with house.worker():
        job_id = house.submit(table(8), SPEC)
        until(lambda: house.job(job_id)["stage"] == "train", 60, "it trains")
        assert house.client.post(f"/jobs/{job_id}/cancel").status_code == 202
        until(lambda: house.job(job_id)["status"] == "cancelled", 8, "it is cancelled")
        until(lambda: not scratch(), 20, "its folder on the node is gone")


def test_a_job_that_finds_no_place_says_so_and_can_be_cancelled(house: House) -> None:
    with house.worker(RAY_CPUS="4"):
        job_id = house.submit(table(1), SPEC)
        until(
            lambda: house.job(job_id)["progress"]["message"] == "waiting for a place in the cluster", 60, "it says so"
        )
        house.client.post(f"/jobs/{job_id}/cancel")
        until(lambda: house.job(job_id)["status"] == "cancelled", 8, "it is cancelled")


def test_a_worker_that_is_told_to_stop_gives_its_job_back_with_its_checkpoint(house: House) -> None:
    with house.worker() as worker:
        job_id = house.submit(table(8), SPEC)
        until(lambda: a_checkpoint_is_kept(house, job_id), 120, "a checkpoint of its steps is kept")
        worker.terminate()
        assert worker.wait(30) == 0
    assert house.job(job_id)["status"] == "queued"
    with house.worker():
        assert house.ended(job_id)["status"] == "succeeded"
    told = " ".join(house.told(job_id))
    assert "Training goes on from its checkpoint: epoch" in told
    assert "lost" not in told


def test_a_worker_that_is_killed_takes_its_processes_on_the_cluster_with_it(house: House) -> None:
    with house.worker() as worker:
        job_id = house.submit(table(8), SPEC)
        until(lambda: a_checkpoint_is_kept(house, job_id), 120, "a checkpoint of its steps is kept")
        worker.send_signal(signal.SIGKILL)
        until(lambda: house.node_of("worker.child") is None, 30, "the process on the node has ended")
        until(lambda: not scratch(), 20, "its texts are gone from the node")
    with house.worker():
        job = house.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job
    print("\nworker: 1 killed, 1 attempt lost, 0 jobs lost")


def test_a_file_is_labelled_as_here_while_a_node_with_an_engine_is_lost(house: House, whole: str) -> None:
    lines = [line.rpartition(",")[0] for line in table(100).splitlines()[1:]]
    rows = list(itertools.islice(itertools.cycle(lines), 100_000))
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("text", "n"), *((text, i) for i, text in enumerate(rows))])
    spec = {"kind": "predict", "model": house.job(whole)["model_id"]}
    with house.worker(BULK_ACTORS="2"):
        job_id = house.submit(file.getvalue(), spec)
        until(lambda: house.job(job_id)["progress"]["fraction"] > 0.2, 240, "a fifth of it is done")
        house.lose(house.node_of("MapBatches(_Scorer)"))
        job = house.ended(job_id, 600)
    assert (job["status"], job["attempt"]) == ("succeeded", 1), job
    answers = list(csv.DictReader(io.StringIO(house.artifact(job_id, "predictions.csv").decode(), newline="")))
    assert [int(row["row_id"]) for row in answers] == list(range(100_000))
    assert [row["text"] for row in answers] == rows
    with house.worker(LAUNCHER="local"):
        here = house.submit(file.getvalue(), spec)
        assert house.ended(here, 600)["status"] == "succeeded"
    assert house.artifact(job_id, "predictions.csv") == house.artifact(here, "predictions.csv")
    print("\n100,000 rows, 2 engines: 1 node killed, rows lost 0, rows twice 0, the bytes of one machine")


STUB = """
import sys
from pathlib import Path
from service.ml.dataset import TableFormat
from tests.stub_labeller import StubLabeller
from worker.bulk import Parts
from worker.cluster.bulk import label_on_actors
place = Path(sys.argv[1])
cluster = {"address": sys.argv[2], "cpus": 1, "gpus": 0, "bulk_actors": 2}
parts = Parts(place / "parts")
table = TableFormat("text", None, None, ",", True, "utf-8", False)
label_on_actors(cluster, (place / "model",), place / "rows.csv", table, parts, lambda n: print(n, flush=True),
                lambda _: None, make=StubLabeller)
parts.join(["row_id", "label"], place / "predictions.csv")
"""


def test_ten_million_rows_are_each_labelled_once_while_a_node_is_lost(house: House, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with (tmp_path / "rows.csv").open("w") as file:
        file.write("text\n")
        file.writelines(f"text number {i}\n" for i in range(10_000_000))
    run = [sys.executable, "-P", "-c", STUB, str(tmp_path), house.address]
    lost = False
    with (tmp_path / "log.txt").open("wb") as log, subprocess.Popen(run, stdout=subprocess.PIPE, stderr=log) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if not lost and int(line) > 2_000_000:
                lost = True
                house.lose(house.node_of("MapBatches(_Scorer)"))
    assert driver.returncode == 0, (tmp_path / "log.txt").read_text()[-3000:]
    with (tmp_path / "predictions.csv").open() as answers:
        assert next(answers) == "row_id,label\n"
        for i, answer in enumerate(answers):
            if answer != f"{i},{i % 7}\n":
                pytest.fail(f"row {i} is answered by {answer}")
    assert (lost, i) == (True, 9_999_999)
    print("\n10,000,000 rows, 2 actors with a stub: 1 node killed, rows lost 0, rows twice 0")


def test_a_link_in_place_of_the_folder_for_places_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.cluster.launch import Place

    (tmp_path / "home" / "documents").mkdir(parents=True)
    (tmp_path / f"tuneproof-{os.getuid()}").symlink_to(tmp_path / "home")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PermissionError):
        Place()
    assert (tmp_path / "home" / "documents").exists()


def test_a_worker_without_a_cluster_says_so_in_a_line(tmp_path: Path) -> None:
    env = os.environ | {"TUNEPROOF_DATA_DIR": str(tmp_path), "TUNEPROOF_LAUNCHER": "ray",
                        "TUNEPROOF_RAY_ADDRESS": "127.0.0.1:9"}  # fmt: skip
    ended = subprocess.run([sys.executable, "-P", "-m", "worker"], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "TUNEPROOF_RAY_ADDRESS: no Ray cluster answers at '127.0.0.1:9'. Is its head running" in ended.stderr
    assert "Traceback" not in ended.stderr
