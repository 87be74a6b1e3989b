"""The event stream as a browser has it: replayed, live, across a lost connection and a restart, and ended in time."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx_sse import EventSource, ServerSentEvent, connect_sse

from service.api import events as events_module
from service.api import jobs as jobs_routes
from service.api.events import _wants_stream
from service.db import catalog, jobs
from service.db.engine import Database
from service.db.jobs import Lease, Progress
from tests.databases import database_url
from tests.integration.conftest import listening, make_app
from tests.problems import problem_of
from tests.rows import GRACE, LEASE_SECONDS, START, add_job, claim
from tests.waiting import until

Start = Callable[..., TestClient]
STREAM = {"accept": "text/event-stream"}
SOON = 10.0  # seconds; what is waited for takes a quarter of one


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return make_app(tmp_path / "data")


@pytest.fixture
def db(app: FastAPI, tmp_path: Path) -> Iterator[Database]:
    """As a worker has it: connections of its own."""
    database = Database(database_url(tmp_path / "data"))
    yield database
    database.close()


@contextmanager
def stream(url: str, job_id: str, *, query: str = "", **headers: str) -> Iterator[tuple[EventSource, Any]]:
    """The open stream and its events, which are waited for no longer than `SOON`."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    with (
        httpx.Client(timeout=SOON, verify=False) as client,  # no certificates are read for plain http
        connect_sse(client, "GET", f"{url}/jobs/{job_id}/events{query}", headers=given) as source,
    ):
        yield source, source.iter_sse()


def told(event: ServerSentEvent) -> tuple[str, str]:
    """What an event is about, in short; `event:` and `retry:` lines are never sent."""
    assert (event.event, event.retry) == ("message", None)
    body = event.json()
    return body["type"], body["message"]


def report(db: Database, lease: Lease, fraction: float, *messages: str) -> None:
    events: Any = [("info", "metric", message, {"loss": 0.5}) for message in messages]
    jobs.report(db, lease, START, Progress("train", fraction, f"at {fraction}", 9.0), events)


def test_what_happened_is_replayed_and_what_happens_is_sent_until_the_job_has_ended(app: FastAPI, db: Database) -> None:
    job_id = add_job(db)
    with listening(app) as url, stream(url, job_id) as (source, events):
        assert source.response.headers["content-type"].startswith("text/event-stream")
        assert source.response.headers["cache-control"] == "no-store"
        queued = next(events)
        assert (queued.id, told(queued)) == ("1", ("status", "queued"))
        assert set(queued.json()) == {"id", "job_id", "created_at", "level", "type", "message", "data"}
        assert queued.json() == httpx.get(f"{url}/jobs/{job_id}/events").json()["data"][0]
        first = next(events).json()
        assert (first["id"], first["job_id"], first["type"], first["level"]) == (1, job_id, "progress", "info")
        assert first["data"] == {
            "stage": None, "fraction": 0.0, "eta_seconds": None, "status": "queued", "attempt": 0
        }  # fmt: skip
        lease = claim(db).lease
        assert told(next(events)) == ("status", "attempt 1 started")
        assert next(events).json()["data"]["status"] == "running"
        report(db, lease, 0.5, "loss 0.5\nand a second line", "loss 0.4")
        assert told(next(events)) == ("metric", "loss 0.5\nand a second line")
        assert told(next(events)) == ("metric", "loss 0.4")
        moved = next(events)
        assert told(moved) == ("progress", "at 0.5")
        assert moved.json()["data"] == {
            "stage": "train", "fraction": 0.5, "eta_seconds": 9.0, "status": "running", "attempt": 1
        }  # fmt: skip
        jobs.publish(db, lease, [], [], {}, START, GRACE)
        assert told(next(events)) == ("status", "succeeded")
        assert next(events).json()["data"]["status"] == "succeeded"
        assert list(events) == []


def test_progress_has_no_number_of_its_own_so_it_is_never_replayed(app: FastAPI, db: Database) -> None:
    job_id = add_job(db)
    with listening(app) as url:
        with httpx.stream("GET", f"{url}/jobs/{job_id}/events", headers=STREAM, timeout=SOON) as answer:
            text = ""
            for chunk in answer.iter_text():
                text += chunk
                if text.count("\n\n") == 2:
                    break
        queued, progress = text.strip().split("\n\n")
        assert [line.partition(":")[0] for line in queued.splitlines()] == ["data", "id"]
        assert [line.partition(":")[0] for line in progress.splitlines()] == ["data"]
        assert json.loads(progress.removeprefix("data: "))["id"] == 1


def test_after_a_lost_connection_and_a_restart_nothing_is_missing_and_nothing_comes_twice(
    app: FastAPI, db: Database, tmp_path: Path
) -> None:
    job_id, seen = add_job(db), []
    lease = claim(db).lease
    report(db, lease, 0.1, *(f"step {i}" for i in range(450)))
    with listening(app) as url:
        with stream(url, job_id) as (_, events):
            seen += [next(events).id for _ in range(7)]  # and the connection is lost
        with stream(url, job_id, last_event_id=seen[-1], query="?after=2") as (_, events):
            seen += [next(events).id for _ in range(203)]
    report(db, lease, 0.2, "while nobody listened")
    with listening(make_app(tmp_path / "data", fresh=False)) as url:
        jobs.fail(db, lease, {"code": "internal", "message": "x", "hint": None}, START, GRACE)
        with stream(url, job_id, last_event_id=seen[-1]) as (_, events):
            rest = list(events)
        assert httpx.get(f"{url}/jobs/{job_id}/events", headers=STREAM | {"last-event-id": rest[-1].id}).content == b""
    # The last one is the progress, which leaves the number where it was.
    seen += [event.id for event in rest[:-1]]
    assert seen == [str(number) for number in range(1, len(seen) + 1)]
    assert len(seen) == 454
    assert [told(event) for event in rest[-2:]] == [("status", "failed: x"), ("progress", "at 0.2")]


def test_with_nothing_left_to_send_an_event_source_is_told_to_stop(start: Start) -> None:
    client = start()
    db = client.app.state.context.db  # type: ignore[attr-defined]
    job_id = add_job(db)
    with db.write() as session:
        jobs.cancel(session, job_id, START)
    path = f"/jobs/{job_id}/events"
    assert [event["id"] for event in client.get(path).json()["data"]] == [1, 2]
    for headers, query in (({"last-event-id": "2"}, ""), ({}, "?after=2"), ({"last-event-id": "3"}, "?after=1")):
        answer = client.get(f"{path}{query}", headers=STREAM | headers)
        assert (answer.status_code, answer.content) == (204, b"")
    replayed = client.get(f"{path}?after=1", headers=STREAM)
    assert replayed.text.startswith("data: {")
    assert [line for line in replayed.text.splitlines() if line.startswith("id")] == ["id: 2"]


def test_it_works_when_the_worker_is_another_process(app: FastAPI, db: Database) -> None:
    job_id = add_job(db)
    program = """if True:
        import sys
        from service.db import jobs
        from service.db.engine import Database
        from tests.rows import GRACE, START
        db = Database(sys.argv[1])
        lease = jobs.claim(db, "wrk_1", START, 30.0).lease
        jobs.report(db, lease, START, jobs.Progress("train", 0.3, "there", None), [("info", "message", "hello", {})])
        jobs.publish(db, lease, [], [], {}, START, GRACE)
    """
    with listening(app) as url, stream(url, job_id) as (_, events):
        assert told(next(events)) == ("status", "queued")
        subprocess.run([sys.executable, "-c", program, db.url], check=True, timeout=60)
        kinds = [told(event) for event in events]
    written = [kind for kind in kinds if kind[0] != "progress"]
    assert written == [("status", "attempt 1 started"), ("message", "hello"), ("status", "succeeded")]
    assert kinds[-1] == ("progress", "done")


# How it ends --------------------------------------------------------------------------------------
def test_a_stopping_server_ends_streams_and_long_polls_at_once(
    app: FastAPI, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, asked, get_job = add_job(db), threading.Event(), jobs_routes.get_job

    def noted(*given: Any) -> Any:
        asked.set()
        return get_job(*given)

    monkeypatch.setattr(jobs_routes, "get_job", noted)
    with ThreadPoolExecutor() as pool, ExitStack() as server:
        url = server.enter_context(listening(app))
        polled = pool.submit(httpx.get, f"{url}/jobs/{job_id}/wait?timeout_seconds=60", timeout=60)
        with stream(url, job_id) as (_, events):
            assert [told(next(events))[0] for _ in range(2)] == ["status", "progress"]
            assert asked.wait(SOON)  # the long poll is there too
            began = time.monotonic()
            stopped = pool.submit(server.close)
            assert list(events) == []
        assert polled.result(SOON).json()["status"] == "queued"
        stopped.result(SOON)
        assert time.monotonic() - began < 5


def test_a_stream_that_nobody_reads_any_more_is_given_up(app: FastAPI, db: Database) -> None:
    job_id = add_job(db)
    context = app.state.context
    with listening(app) as url:
        with stream(url, job_id) as (_, events):
            next(events)
            assert context.streams.taken == 1
        until(lambda: context.streams.taken == 0, SOON, "the stream is given up")


def test_a_deleted_job_ends_it(app: FastAPI, db: Database) -> None:
    job_id = add_job(db)
    with listening(app) as url, stream(url, job_id) as (_, events):
        next(events), next(events)
        with db.write() as session:
            session.delete(jobs.get(session, job_id))
        assert list(events) == []
        problem_of(httpx.get(f"{url}/jobs/{job_id}/events", headers=STREAM), 404, "not_found")


def test_silence_is_broken_by_pings_and_a_revoked_key_ends_it(
    app: FastAPI, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "_SECONDS_BETWEEN_PINGS", 0.01)
    job_id = add_job(db)
    with db.write() as session:
        key, secret = catalog.create_key(session, "me", "read", START)
    headers = STREAM | {"authorization": f"Bearer {secret}"}
    with (
        listening(app) as url,
        httpx.stream("GET", f"{url}/jobs/{job_id}/events", headers=headers, timeout=SOON) as answer,
    ):
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": ping"
        with db.write() as session:
            catalog.revoke_key(session, key.id, START)
        assert not any(line.startswith("id: 2") for line in lines)  # and they come to an end
        problem_of(httpx.get(f"{url}/jobs/{job_id}/events", headers=headers), 401, "unauthorized")


def test_past_the_limit_a_stream_is_503_and_a_place_given_back_is_taken_again(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", max_event_streams=2)
    job_id = add_job(app.state.context.db)
    with listening(app) as url:
        with stream(url, job_id) as (_, one), stream(url, job_id) as (_, two):
            next(one), next(two)
            refused = httpx.get(f"{url}/jobs/{job_id}/events", headers=STREAM)
            assert "TUNEPROOF_MAX_EVENT_STREAMS" in problem_of(refused, 503, "too_many_streams")["detail"]
            assert httpx.get(f"{url}/jobs/{job_id}/events").status_code == 200
        until(lambda: app.state.context.streams.taken == 0, SOON, "both places are given back")
        with stream(url, job_id) as (_, three):
            assert told(next(three)) == ("status", "queued")


def test_streams_hold_no_thread_so_everybody_else_is_answered(app: FastAPI, db: Database) -> None:
    """More of them than the pool has threads, which are 40."""
    job_id = add_job(db)
    with listening(app) as url, ExitStack() as stack:
        streams = [stack.enter_context(stream(url, job_id))[1] for _ in range(45)]
        for events in streams:
            assert [told(next(events))[0] for _ in range(2)] == ["status", "progress"]
        began = time.monotonic()
        assert httpx.get(f"{url}/jobs", timeout=SOON).status_code == 200
        assert time.monotonic() - began < 2
        jobs.claim(db, "wrk_1", START, LEASE_SECONDS)
        assert {told(next(events)) for events in streams} == {("status", "attempt 1 started")}


# What is asked for --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("accept", "streams"),
    [("text/event-stream", True), ("Text/Event-Stream; q=0.5", True), ("text/event-stream, */*;q=0.1", True),
     ("application/json;q=0.5, text/event-stream", True), ("", False), ("*/*", False), ("application/json", False),
     ("application/json, text/event-stream", False), ("text/event-stream;q=0", False), ("text/*", False),
     ("application/json, text/event-stream;q=0.9", False), ("text/event-streams", False)],
)  # fmt: skip
def test_json_is_given_unless_a_stream_is_preferred(accept: str, streams: bool) -> None:
    assert _wants_stream(accept) is streams


def test_a_stream_of_no_job_or_from_no_number_is_refused(start: Start) -> None:
    client = start()
    job_id = add_job(client.app.state.context.db)  # type: ignore[attr-defined]
    problem_of(client.get("/jobs/job_0/events", headers=STREAM), 404, "not_found")
    for number in ("x", "-1", "1.5", str(2**63), ""):
        answer = client.get(f"/jobs/{job_id}/events", headers=STREAM | {"last-event-id": number})
        assert problem_of(answer, 422, "invalid_input")["errors"], number
    assert client.get(f"/jobs/{job_id}/events").headers["vary"] == "Accept"


def test_the_document_names_both_media_types(start: Start) -> None:
    route = start().get("/openapi.json").json()["paths"]["/jobs/{job_id}/events"]["get"]
    assert set(route["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "204" in route["responses"]
    assert "Last-Event-ID" in {parameter["name"].title().replace("Id", "ID") for parameter in route["parameters"]}
