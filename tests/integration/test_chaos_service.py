"""Servers and workers that are killed and stopped at random moments lose nothing and publish nothing twice."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from service.db.engine import Database
from service.db.models import Dataset
from service.main import _round
from service.storage import Storage
from tests import chaos
from tests.chaos import ServerProcess, Uploader, Workers
from tests.databases import fresh_database
from tests.integration.conftest import LOOPBACK, make_app
from tests.problems import problem_of
from tests.rows import StillClock, add_dataset, add_job, read_job
from tests.tiny import BERT, labelled_texts
from tests.waiting import until
from worker.scratch import own_folder

SECONDS = float(os.environ.get("CHAOS_SECONDS") or 600)
FAST = {"lease_seconds": 2, "poll_seconds": 0.1, "max_attempts": 1000}
TABLE = b"text,label\nhello,a\nbye,b\n"


def add_bytes(db: Database, folder: Path, name: str = "tickets") -> str:
    key = f"datasets/{name}/file"
    (folder / "storage" / key).parent.mkdir(parents=True, exist_ok=True)
    (folder / "storage" / key).write_bytes(TABLE)
    dataset_id = add_dataset(db, storage_key=key)
    with db.write() as session:
        session.execute(update(Dataset).where(Dataset.id == dataset_id).values(name=name))
    return dataset_id


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Database]:
    fresh_database(tmp_path).close()
    db = Database(f"sqlite:///{tmp_path / 'tuneproof.db'}")
    yield db
    db.close()


@pytest.mark.parametrize("n_jobs", [12, pytest.param(40, marks=pytest.mark.more)])
def test_jobs_under_three_workers_that_are_killed_and_stopped_are_each_published_once(
    bench: Database, tmp_path: Path, n_jobs: int
) -> None:
    """Stops last longer than the lease, so that workers wake up whose jobs others have."""
    dataset_id = add_bytes(bench, tmp_path)
    for _ in range(n_jobs):
        add_job(bench, dataset_id)
    workers, chance = Workers(3, data_dir=tmp_path, **FAST), random.Random(11)
    try:
        deadline = time.monotonic() + 200
        for _ in chaos.disturb(workers, chance, 0.3, 2.6, lambda: chaos.open_jobs(bench) > 0, n_jobs):
            assert time.monotonic() < deadline, chaos.outcome(bench, tmp_path)
    finally:
        workers.close()
    found = chaos.outcome(bench, tmp_path)
    assert (found.not_succeeded, found.published_twice, found.not_whole) == ([], [], [])
    assert found.jobs == n_jobs
    assert workers.kills + workers.stops > n_jobs // 5
    assert found.attempts > n_jobs
    assert chaos.integrity(tmp_path) == [("ok",)]
    assert chaos.strays(bench, Storage(f"file://{tmp_path / 'storage'}"), tmp_path) == set()
    with own_folder(tmp_path / "work", "wrk_last"):  # what the last to be killed left goes with the next that starts
        pass
    assert [path.name for path in (tmp_path / "work").iterdir() if path.name != "lock"] == []


@pytest.mark.more
def test_a_job_that_kills_its_worker_each_time_is_given_up_and_the_others_are_done(
    bench: Database, tmp_path: Path
) -> None:
    poison = add_job(bench, add_bytes(bench, tmp_path, "poison"))
    good = add_job(bench, add_bytes(bench, tmp_path))
    workers = Workers(1, data_dir=tmp_path, **FAST | {"max_attempts": 3})
    try:

        def ended() -> bool:
            workers.replace_lost()
            return chaos.open_jobs(bench) == 0

        until(ended, 60, "both have ended")
    finally:
        workers.close()
    job = read_job(bench, poison)
    assert job.error is not None
    assert (job.status, job.error["code"], job.attempt, job.failures) == ("failed", "worker_lost", 3, 3)
    assert read_job(bench, good).status == "succeeded"


@pytest.mark.more
def test_what_a_server_acknowledged_survives_its_death_at_any_moment(tmp_path: Path) -> None:
    server, chance = ServerProcess(tmp_path), random.Random(3)
    uploaders = [Uploader(server.url, seed) for seed in (1, 2)]
    try:
        with uploaders[0], uploaders[1]:
            for kills in range(1, 4):
                before = [uploader.acknowledged for uploader in uploaders]
                more = lambda before=before: all(  # noqa: E731
                    uploader.acknowledged > had + 3 for uploader, had in zip(uploaders, before, strict=True)
                )
                until(more, 60, "uploads are acknowledged")
                time.sleep(chance.uniform(0, 0.2))  # anywhere in an upload
                server.kill()
                assert server.kills == kills
                server.start()
        assert sum(uploader.failed for uploader in uploaders) >= 3
        assert [surprise for uploader in uploaders for surprise in uploader.surprises] == []
        with httpx.Client(base_url=server.url, timeout=30) as client:
            assert chaos.lost_uploads(uploaders, client, tmp_path) == []
    finally:
        server.close()
    assert chaos.integrity(tmp_path) == [("ok",)]


@pytest.mark.more
def test_an_upload_half_sent_when_the_server_is_told_to_stop_is_finished_and_kept(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    content = b"text,label\n" + b"".join(b"text %d,%s\n" % (i, (b"a", b"b")[i % 2]) for i in range(150_000))
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n' + content + b"\r\n--x--\r\n"
    head = (
        f"POST /datasets HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(form)}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nExpect: 100-continue\r\n\r\n"
    )
    try:
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(head.encode())
            assert b" 100 " in connection.recv(1000), "it has begun to read"
            connection.sendall(form[: len(form) // 2])
            server.process.send_signal(signal.SIGTERM)
            until(lambda: refuses(server.port), 20, "nobody new is let in")
            assert server.process.poll() is None
            connection.sendall(form[len(form) // 2 :])
            answered = b""
            while chunk := connection.recv(1 << 16):
                answered += chunk
        assert server.process.wait(30) == -signal.SIGTERM  # uvicorn, once all is done, raises again what it was told by
    finally:
        server.close()
    status, _, rest = answered.partition(b"\r\n")
    assert status == b"HTTP/1.1 201 Created"
    sha256 = hashlib.sha256(content).hexdigest()
    assert sha256.encode() in rest
    with TestClient(make_app(tmp_path, fresh=False), client=LOOPBACK) as client:
        [dataset] = client.get("/datasets").json()["data"]
        assert dataset["sha256"] == sha256
        assert client.get(f"/datasets/{dataset['id']}/rows?offset=149999").json()["data"][0]["text"] == "text 149999"


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


# A disk that is really full -----------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (that takes root)")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("kept_back", [4 << 20, pytest.param(0, marks=pytest.mark.more)])
def test_on_a_full_disk_nothing_is_acknowledged_in_vain_and_it_goes_on_when_there_is_room(
    small_disk: Path, kept_back: int
) -> None:
    """Where nothing is kept back, not even a row can be deleted on it: the operator has to make room first."""
    clock, ballast = StillClock(), small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    app = make_app(small_disk, clock=clock, min_free_bytes=kept_back, delete_grace_seconds=0)
    client, acknowledged = TestClient(app, client=LOOPBACK, raise_server_exceptions=False), dict[str, str]()
    chance = random.Random(5)

    def upload(rows: int) -> Any:
        lines = [b"%x,%s" % (chance.getrandbits(400), (b"a", b"b")[i % 2]) for i in range(rows)]
        content = b"text,label\n" + b"\n".join(lines) + b"\n"
        answer = client.post("/datasets", files={"file": ("a.csv", content)})
        if answer.is_success:
            acknowledged[answer.json()["id"]] = hashlib.sha256(content).hexdigest()
        return answer

    def assert_whole() -> None:
        listed = client.get("/datasets?limit=200").json()["data"]
        assert {row["id"]: row["sha256"] for row in listed} == acknowledged
        with app.state.context.db.read() as session:
            for dataset in session.scalars(select(Dataset)):
                stored = b"".join(app.state.context.storage.chunks(dataset.storage_key))
                assert hashlib.sha256(stored).hexdigest() == acknowledged[dataset.id]
        assert chaos.integrity(small_disk) == [("ok",)]

    while (answer := upload(9000)).is_success:
        assert len(acknowledged) < 20
    for rows in (9000, 4000, 1000, 200, 50):  # into the last corner
        while (answer := upload(rows)).is_success:
            assert len(acknowledged) < 500
        problem_of(answer, 507, "low_disk")
    assert len(acknowledged) > 5
    assert_whole()
    if not kept_back:
        ballast.unlink()
    first = min(acknowledged)
    assert client.delete(f"/datasets/{first}").status_code == 204
    del acknowledged[first]
    clock.advance(2 * 24 * 3600)
    _round(app.state.context)
    assert upload(1000).status_code == 201
    assert_whole()
    app.state.context.db.close()


# Ten minutes --------------------------------------------------------------------------------------
@pytest.mark.chaos
@pytest.mark.timeout(SECONDS + 900)
def test_a_service_under_kills_loses_nothing_and_publishes_nothing_twice(tmp_path: Path, tiny_models: Path) -> None:
    """Stubs in most jobs, and real training in some; servers and workers are killed throughout."""
    real = {"models_dir": tiny_models, "serve_dtype": "fp32"}
    settings = FAST | {"lease_seconds": 3, "checkpoint_seconds": 0.5}
    server, chance = ServerProcess(tmp_path, **FAST, **real), random.Random(17)
    workers = Workers(3, data_dir=tmp_path, **settings, **real)
    uploaders = [Uploader(server.url, seed, pause_seconds=0.3) for seed in (1, 2)]
    db = Database(f"sqlite:///{tmp_path / 'tuneproof.db'}")
    started, restart = time.monotonic(), threading.Thread()
    try:
        next_kill = next_real = started
        with uploaders[0], uploaders[1]:
            for _ in chaos.disturb(workers, chance, 3.0, 5.0, lambda: time.monotonic() - started < SECONDS, 10**9):
                now = time.monotonic()
                if now >= next_real and train(server.url):
                    next_real = now + 20
                if now >= next_kill and not restart.is_alive():
                    restart = threading.Thread(target=server.restart)
                    restart.start()
                    next_kill = now + chance.uniform(5, 15)
            restart.join()
        for _ in chaos.disturb(workers, chance, 0, 0, lambda: chaos.open_jobs(db) > 0, 0):
            assert time.monotonic() - started < SECONDS + 600, chaos.outcome(db, tmp_path)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            lost = chaos.lost_uploads(uploaders, client, tmp_path)
    finally:
        workers.close()
        server.close()
    found = chaos.outcome(db, tmp_path)
    stray = chaos.strays(db, Storage(f"file://{tmp_path / 'storage'}"), tmp_path)
    db.close()
    surprises = [surprise for uploader in uploaders for surprise in uploader.surprises]
    wrong = {
        "jobs that did not succeed": found.not_succeeded, "double publications": found.published_twice,
        "jobs not whole": found.not_whole, "uploads and jobs lost": lost, "stray files": sorted(stray),
        "answers that should not be": surprises,
    }  # fmt: skip
    counted = {
        "seconds": round(time.monotonic() - started), "jobs": found.jobs, "of them trained": found.trained,
        "attempts": found.attempts,
        "workers killed": workers.kills, "workers stopped": workers.stops, "servers killed": server.kills,
        "uploads and jobs acknowledged": sum(uploader.acknowledged for uploader in uploaders),
        "calls without an answer": sum(uploader.failed for uploader in uploaders),
    }  # fmt: skip
    print()
    for name, number in {**counted, **{name: len(ids) for name, ids in wrong.items()}}.items():
        print(f"{name:32}{number:8}")
    assert not any(wrong.values()), wrong
    assert chaos.integrity(tmp_path) == [("ok",)]
    assert min(counted.values()) > 0


def train(url: str) -> bool:
    """Starts a job with a real child; gives whether that was acknowledged."""
    texts, labels = labelled_texts(200)
    content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    spec = {"kind": "train", "seed": chaos.REAL, "base_model": BERT, "train": {"max_length": 32, "epochs": 3}}
    try:
        files = {"file": ("t.csv", content.encode())}
        return httpx.post(f"{url}/jobs", files=files, data={"spec": json.dumps(spec)}, timeout=30).status_code == 202
    except httpx.TransportError:
        return False
