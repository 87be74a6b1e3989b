"""What is too much is refused with a status that says so and when to ask again; what was taken goes on."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi.testclient import TestClient

from service.api import envelope
from service.api.overload import Pace
from service.core.errors import RateLimited
from service.db import catalog, jobs
from service.db import engine as engine_module
from tests.databases import sqlite_only
from tests.integration.conftest import listening, make_app
from tests.problems import problem_of
from tests.rows import START, add_dataset, add_job, add_published
from tests.waiting import until
from tuneproof.demo import free_port

Start = Callable[..., TestClient]
CSV = b"text,label\n" + b"".join(b"text %d,%s\n" % (i, b"ab"[i % 2 : i % 2 + 1]) for i in range(12))
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n' + CSV + b"\r\n--x--\r\n"


@contextlib.contextmanager
def half_sent(url: str, path: str, kind: str, body: bytes) -> Iterator[socket.socket]:
    """A connection on which a request was begun; the second half of its body is still to come."""
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=20) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[: len(body) // 2])
        yield connection


def test_past_the_limit_an_upload_is_429_and_the_one_that_was_taken_goes_on(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", max_uploads=1)
    with listening(app) as url, half_sent(url, "/datasets", "multipart/form-data; boundary=x", FILE) as first:
        until(lambda: app.state.context.uploads.taken == 1, 20, "the first is being read")
        for path in ("/datasets", "/jobs"):
            refused = httpx.post(url + path, files={"file": CSV})
            assert "TUNEPROOF_MAX_UPLOADS" in problem_of(refused, 429, "queue_full")["detail"]
        first.sendall(FILE[len(FILE) // 2 :])
        assert first.recv(100).startswith(b"HTTP/1.1 201 ")
        assert httpx.post(f"{url}/datasets", files={"file": CSV}).status_code == 201
    assert list((tmp_path / "data" / "tmp").iterdir()) == []


def test_an_upload_that_is_broken_off_gives_its_place_back(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", max_uploads=1)
    uploads = app.state.context.uploads
    with listening(app) as url:
        with half_sent(url, "/datasets", "multipart/form-data; boundary=x", FILE):
            until(lambda: uploads.taken == 1, 20, "it is being read")
        until(lambda: uploads.taken == 0, 20, "its place is given back")
        assert httpx.post(f"{url}/datasets", files={"file": b"no table"}).status_code == 422
        assert httpx.post(f"{url}/datasets", files={"file": CSV}).status_code == 201


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (b"GET /", b"x" * 30_000),
        (b"GET / HTTP/1.1\r\nX-A: ", b"x" * 30_000),
        (b"GET / HTTP/1.1\r\n", b"x: y\r\n" * 5000),
    ],
    ids=["a path", "a header", "many headers"],
)
def test_a_head_that_does_not_end_is_cut_off(tmp_path: Path, begun: bytes, more: bytes) -> None:
    with listening(make_app(tmp_path / "data")) as url:
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=20) as connection:
            connection.sendall(begun)
            with pytest.raises(ConnectionError):  # noqa: PT012 -- which of them is cut off depends on buffers
                for _ in range(1000):
                    connection.sendall(more)
        assert httpx.get(f"{url}/healthz", headers={"x-long": "x" * 30_000}).status_code == 200


def test_past_the_limit_a_job_is_429_until_one_has_left_the_queue(start: Start) -> None:
    client = start(max_queued_jobs=2)
    db = client.app.state.context.db  # type: ignore[attr-defined]
    dataset_id = add_dataset(db)
    first, _second = (client.post("/jobs", json={"dataset_id": dataset_id}).json()["id"] for _ in range(2))
    for refused in (client.post("/jobs", json={"dataset_id": dataset_id}), client.post("/jobs", files={"file": CSV})):
        assert "TUNEPROOF_MAX_QUEUED_JOBS" in problem_of(refused, 429, "queue_full")["detail"]
        assert refused.headers["retry-after"] == "60"
    assert len(client.get("/datasets").json()["data"]) == 1  # the refused job's file is not kept
    assert client.post(f"/jobs/{first}/cancel").status_code == 202
    assert client.post("/jobs", json={"dataset_id": dataset_id}).status_code == 202
    problem_of(client.post(f"/jobs/{first}/retry"), 429, "queue_full")
    assert jobs.claim(db, "wrk_1", START, 30) is not None
    assert client.post(f"/jobs/{first}/retry").status_code == 202


def test_bodies_of_predict_are_held_to_what_memory_they_may_take_together(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", predict_body_bytes=4000)
    ctx = app.state.context
    _job, model_id = add_published(ctx.db, ctx.storage)
    body = b'{"model":"%s","text":"%s"}' % (model_id.encode(), b"x" * 3500)
    with listening(app) as url, half_sent(url, "/predict", "application/json", body) as first:
        until(lambda: ctx.predict_bytes.taken > 0, 20, "the first is being read")
        small = {"model": model_id, "text": "y" * 3000}
        refused = httpx.post(f"{url}/predict", json=small)
        assert "TUNEPROOF_PREDICT_BODY_BYTES" in problem_of(refused, 429, "queue_full")["detail"]
        problem_of(httpx.post(f"{url}/predict", json=small | {"text": "y" * 5000}), 413, "too_large")
        first.sendall(body[len(body) // 2 :])
        assert first.recv(100).startswith(b"HTTP/1.1 503 ")  # the engine here is quiet: it was asked
        until(lambda: ctx.predict_bytes.taken == 0, 20, "its memory is given back")
        problem_of(httpx.post(f"{url}/predict", json=small), 503, "engine_unavailable")


def test_past_the_limit_a_long_poll_is_503_and_a_job_can_still_be_asked_for(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", max_event_streams=1)
    job_id = add_job(app.state.context.db)
    events = {"accept": "text/event-stream"}
    with listening(app) as url, httpx.stream("GET", f"{url}/jobs/{job_id}/events", headers=events) as stream:
        lines = stream.iter_lines()
        next(lines)
        problem_of(httpx.get(f"{url}/jobs/{job_id}/wait", params={"timeout_seconds": 20}), 503, "too_many_streams")
        assert httpx.get(f"{url}/jobs/{job_id}").status_code == 200


def test_a_key_that_calls_faster_than_it_may_is_429_and_other_keys_are_not(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", rate_limit=1)
    with app.state.context.db.write() as session:
        secrets = [catalog.create_key(session, name, "read", START)[1] for name in "ab"]
    with TestClient(app) as client:
        one, other = ({"authorization": f"Bearer {secret}"} for secret in secrets)
        assert {client.get("/datasets", headers=one).status_code for _ in range(10)} == {200}
        refused = client.get("/datasets", headers=one)
        assert "TUNEPROOF_RATE_LIMIT" in problem_of(refused, 429, "rate_limited")["detail"]
        assert client.get("/datasets", headers=other).status_code == 200
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(("a_second", "at_once", "wait"), [(5.0, 50, 1), (0.5, 5, 2), (0.01, 1, 100)])
def test_a_rate_holds_over_ten_seconds_and_the_wait_it_names_is_enough(
    a_second: float, at_once: int, wait: int
) -> None:
    now = SimpleNamespace(ticks=0.0)
    pace = Pace(a_second, lambda: now.ticks)
    for _ in range(at_once):
        pace.count("key_1")
    with pytest.raises(RateLimited) as refused:
        pace.count("key_1")
    assert refused.value.retry_after_seconds == wait
    now.ticks += wait
    pace.count("key_1")
    now.ticks += 1000
    for _ in range(at_once):
        pace.count("key_1")
    with pytest.raises(RateLimited):
        pace.count("key_1")


def test_without_a_rate_nobody_is_refused() -> None:
    pace = Pace(0, lambda: 0.0)
    for _ in range(1000):
        pace.count("key_1")


def test_an_upload_that_says_it_will_not_fit_on_the_disk_is_507_before_it_is_read(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(min_free_bytes=1000)
    size = len(client.build_request("POST", "/datasets", files={"file": CSV}).read())
    for free, status in ((1000 + 3 * size - 1, 507), (1000 + 3 * size + 100, 201)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: SimpleNamespace(free=free))
        assert client.post("/datasets", files={"file": CSV}).status_code == status


def test_a_body_that_stands_still_is_408_and_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envelope, "_SECONDS_BETWEEN_CHUNKS", 0.2)
    app = make_app(tmp_path / "data", max_uploads=1)
    with listening(app) as url:
        with half_sent(url, "/datasets", "multipart/form-data; boundary=x", FILE) as still:
            assert still.recv(100).startswith(b"HTTP/1.1 408 ")
            until(lambda: app.state.context.uploads.taken == 0, 20, "its place is given back")
        job_id = add_job(app.state.context.db)  # who waits for an answer is not hurried
        waited = httpx.get(f"{url}/jobs/{job_id}/wait", params={"timeout_seconds": 0.5})
        assert waited.json()["status"] == "queued"


def test_whoever_waits_for_a_job_that_has_ended_needs_no_place(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", max_event_streams=1)
    job_id = add_job(app.state.context.db)
    with TestClient(app, client=("127.0.0.1", 1)) as client, app.state.context.streams.hold():
        problem_of(client.get(f"/jobs/{job_id}/wait"), 503, "too_many_streams")
        client.post(f"/jobs/{job_id}/cancel")
        assert client.get(f"/jobs/{job_id}/wait").json()["status"] == "cancelled"


@sqlite_only
def test_a_database_that_somebody_keeps_locked_is_503(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_SECONDS", 0)
    client = start()
    other = sqlite3.connect(tmp_path / "data" / "tuneproof.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    problem_of(client.post("/datasets", files={"file": CSV}), 503, "database_busy")
    assert client.get("/datasets").json()["data"] == []  # who only reads is not held up
    other.execute("ROLLBACK")
    assert client.post("/datasets", files={"file": CSV}).status_code == 201
    other.close()


@pytest.mark.more
def test_memory_stays_under_its_ceiling_however_many_large_bodies_come(tmp_path: Path) -> None:
    """Of a process of its own: twenty at once of 24 MB each, where 32 MB may be held."""
    port = free_port()
    given = os.environ | {"TUNEPROOF_DATA_DIR": str(tmp_path), "TUNEPROOF_PREDICT_BODY_BYTES": str(32 << 20)}
    words = [sys.executable, "-P", "-m", "service", "serve", "--port", str(port)]
    with subprocess.Popen(words, env=given, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: answers(url), 60, "it answers")
            small = httpx.post(f"{url}/predict", json={"model": "none", "text": "x"})
            assert small.status_code == 404
            before = peak_bytes(process.pid)
            body = {"model": "none", "texts": ["x" * 100_000] * 240}
            with ThreadPoolExecutor(20) as pool:
                answered = [pool.submit(httpx.post, f"{url}/predict", json=body, timeout=60) for _ in range(60)]
            statuses = Counter("cut off" if call.exception() else call.result().status_code for call in answered)
            assert {404} < statuses.keys() <= {404, 429, "cut off"}  # a refusal while a body comes may close the socket
            assert peak_bytes(process.pid) - before < 6 * (32 << 20)
        finally:
            process.terminate()


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").is_success
    return False


def peak_bytes(pid: int) -> int:
    [line] = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
