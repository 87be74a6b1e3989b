"""Two API processes and two workers that share nothing but PostgreSQL and S3, each with a data folder of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from tests.databases import Server, address
from tests.waiting import until
from tuneproof.demo import free_port

pytestmark = pytest.mark.more
WORDS = {"bill": "invoice payment refund", "login": "password account locked", "parcel": "delivery box late"}
TABLE = "text,label\n" + "".join(
    f"{words.split()[i % 3]} number {i} about my {words.split()[(i + 1) % 3]},{label}\n"
    for i in range(24)
    for label, words in WORDS.items()
)
SPEC = {"kind": "train", "train": {"epochs": 1}}


@dataclass
class House:
    """What runs, by what it is."""

    apis: list[httpx.Client]
    processes: dict[str, subprocess.Popen[bytes]]
    bucket: str

    def wait(self, job_id: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            job: dict[str, Any] = self.apis[1].get(f"/jobs/{job_id}").json()
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        return until(ended, 150, "the job has ended")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Iterator[House]:
    root, server = tmp_path_factory.mktemp("house"), Server()
    ports = [free_port(), free_port()]
    shared = {
        "TUNEPROOF_DATABASE_URL": address(server.folder), "TUNEPROOF_STORAGE_URL": f"s3://{bucket}/house",
        "TUNEPROOF_MIN_FREE_BYTES": "0", "TUNEPROOF_LEASE_SECONDS": "15", "TUNEPROOF_POLL_SECONDS": "0.2",
        "TUNEPROOF_CHECKPOINT_SECONDS": "1", "TUNEPROOF_DELETE_GRACE_SECONDS": "0",
    }  # fmt: skip

    def start(name: str, *words: str) -> subprocess.Popen[bytes]:
        (root / name).mkdir()
        env = os.environ | shared | {"TUNEPROOF_DATA_DIR": str(root / name), "OMP_NUM_THREADS": "1"}
        with (root / f"{name}.log").open("wb") as log:
            return subprocess.Popen([sys.executable, "-P", "-m", *words], env=env, stdout=log, stderr=log)

    commands = {f"api {i}": ("service", "serve", "--port", str(port)) for i, port in enumerate(ports)}
    commands |= {f"worker {i}": ("worker",) for i in range(2)}
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        processes = {name: start(name, *words) for name, words in commands.items()}
        stack.callback(lambda: [process.wait(60) for process in processes.values()])
        stack.callback(lambda: [process.terminate() for process in processes.values()])
        clients = [stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)) for port in ports]
        for client in clients:
            until(lambda client=client: answers(client), 120, "the API answers")
        yield House(clients, processes, bucket)


def answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return client.get("/readyz").status_code == 200
    return False


@pytest.fixture(scope="module")
def trained(house: House) -> dict[str, Any]:
    """A job sent to one API, followed on the other, ended well."""
    form = {"spec": json.dumps(SPEC)}
    headers = {"idempotency-key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
    sent = [api.post("/jobs", files={"file": ("a.csv", TABLE)}, data=form, headers=headers) for api in house.apis]
    assert [answer.status_code for answer in sent] == [202, 202], sent[0].text
    assert sent[0].json()["id"] == sent[1].json()["id"], "one key, one job, whichever process was asked"
    with house.apis[1].stream(
        "GET", f"/jobs/{sent[0].json()['id']}/events", headers={"accept": "text/event-stream"}
    ) as stream:
        told = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert {"attempt 1 started", "succeeded"} <= {event["message"] for event in told}
    job = house.wait(sent[0].json()["id"])
    assert job["status"] == "succeeded", job
    return job


def test_a_job_sent_to_one_process_is_followed_and_read_on_the_other(house: House, trained: dict[str, Any]) -> None:
    for api in house.apis:
        names = {artifact["name"] for artifact in api.get(f"/jobs/{trained['id']}").json()["artifacts"]}
        assert {"metrics.json", "predictions.csv", "report.html"} <= names
    whole = house.apis[0].get(f"/jobs/{trained['id']}/artifacts/predictions.csv")
    part = house.apis[1].get(f"/jobs/{trained['id']}/artifacts/predictions.csv", headers={"range": "bytes=5-14"})
    assert (part.status_code, part.content) == (206, whole.content[5:15])


def test_an_artifact_can_be_fetched_from_the_store_itself(house: House, trained: dict[str, Any]) -> None:
    path = f"/jobs/{trained['id']}/artifacts/report.html"
    sent = house.apis[0].get(path, params={"redirect": "true"})
    assert (sent.status_code, sent.headers["cache-control"]) == (307, "no-store")
    assert sent.headers["location"].startswith(os.environ["AWS_ENDPOINT_URL_S3"])
    answer = httpx.get(sent.headers["location"])
    assert answer.content == house.apis[1].get(path).content
    assert answer.headers["content-disposition"] == 'attachment; filename="report.html"'


def test_an_alias_moves_on_every_process_within_a_second(house: House, trained: dict[str, Any]) -> None:
    one, other = house.apis
    assert one.put("/aliases/live", json={"model_id": trained["model_id"]}).status_code == 200
    ask = {"model": "live", "texts": ["my invoice and payment"]}
    until(lambda: other.post("/predict", json=ask).status_code == 200, 60, "the other process's engine holds the model")
    again = one.post("/jobs", json={**SPEC, "dataset_id": trained["dataset_id"]}).json()
    second = house.wait(again["id"])["model_id"]
    for asked, told, model_id in ((one, other, second), (other, one, trained["model_id"])):
        until(lambda told=told, m=model_id: answered_by(told, m) == m, 60, "this model's adapter is loaded")
        moved = asked.put("/aliases/live", json={"model_id": model_id, "force": True})
        assert moved.status_code == 200, moved.text
        time.sleep(1.0)  # what is promised
        assert answered_by(told, "live") == model_id


def answered_by(api: httpx.Client, model: str) -> str | None:
    answer = api.post("/predict", json={"model": model, "texts": ["the parcel is late"]})
    return str(answer.json()["model_id"]) if answer.status_code == 200 else None


def test_a_worker_that_is_killed_is_followed_by_one_elsewhere_from_its_checkpoint(house: House) -> None:
    rows = TABLE + "".join(f"{i} {line}\n" for i in range(12) for line in TABLE.splitlines()[1:])
    spec = {"kind": "train", "train": {"epochs": 16}}
    job_id = house.apis[0].post("/jobs", files={"file": ("b.csv", rows)}, data={"spec": json.dumps(spec)}).json()["id"]
    store = boto3.client("s3")

    seen: set[str] = set()

    def two_are_kept() -> bool:
        found = store.list_objects_v2(Bucket=house.bucket, Prefix=f"house/jobs/{job_id}/checkpoints")
        seen.update(entry["Key"].rpartition("/")[0] for entry in found.get("Contents", []))
        return len(seen) >= 3

    until(two_are_kept, 120, "a third checkpoint is on its way to the bucket")
    [busy] = [name for name, process in house.processes.items() if name.startswith("worker") and at_work(process)]
    house.processes[busy].send_signal(signal.SIGKILL)
    job = house.wait(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    told = " ".join(messages(house.apis[1], job_id))
    assert "its worker was lost" in told
    assert "Training goes on from its checkpoint: epoch" in told


def messages(api: httpx.Client, job_id: str) -> list[str]:
    found: list[str] = []
    after, more = 0, True
    while more:
        page = api.get(f"/jobs/{job_id}/events", params={"limit": 200, "after": after}).json()
        found += [event["message"] for event in page["data"]]
        after, more = page["data"][-1]["id"], page["has_more"]
    return found


def at_work(process: subprocess.Popen[bytes]) -> bool:
    return bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())


def test_what_is_deleted_on_one_process_is_gone_on_the_other_and_in_the_store(house: House) -> None:
    one, other = house.apis
    made = one.post("/datasets", files={"file": ("a.csv", TABLE)}).json()["id"]
    store = boto3.client("s3")

    def held() -> set[str]:
        found = store.list_objects_v2(Bucket=house.bucket, Prefix="house/datasets/").get("Contents", [])
        return {entry["Key"] for entry in found}

    before = held()
    assert other.delete(f"/datasets/{made}").status_code == 204
    assert one.get(f"/datasets/{made}").status_code == 404
    until(lambda: len(held()) == len(before) - 1, 30, "its bytes are deleted")
