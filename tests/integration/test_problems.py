"""One shape for every error, whatever it comes from."""

import asyncio
import errno
import logging
import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import psycopg
import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

import worker.supervisor  # noqa: F401 -- errors that any room defines are to be known here
from service.api.problems import crashed, status_of
from service.core.clock import Steadiness
from service.core.errors import AppError, StorageUnavailable
from service.db import garbage, jobs
from service.main import _round
from service.storage import Storage
from tests.databases import sqlite_only
from tests.integration.conftest import make_app
from tests.problems import every_error, problem_of
from tests.rows import GRACE, StillClock, add_job, add_published, claim

Start = Callable[..., TestClient]


def test_every_error_has_a_status_and_a_slug_of_its_own() -> None:
    errors = set(every_error())
    slugs = [error.code for error in errors]
    assert len(set(slugs)) == len(slugs)
    assert AppError.code not in slugs
    for error in errors:
        assert "code" in vars(error)
        assert re.fullmatch(r"[a-z][a-z_]*", error.code)
        assert error.__doc__
        assert 400 <= status_of(error) < 600


@pytest.mark.parametrize("error", sorted(every_error(), key=lambda error: error.code), ids=lambda error: error.code)
def test_every_error_is_answered_as_a_problem(tmp_path: Any, error: type[AppError]) -> None:
    app = make_app(tmp_path / "data")

    @app.get("/broken")
    def broken() -> None:
        raise error(
            "Expected one thing, found \ud800 another.", errors=[{"loc": ["a", "\ud800", 1], "message": "\udfff"}],
            hint="Do this.",
        )  # fmt: skip

    with TestClient(app, client=("127.0.0.1", 1)) as client:
        body = problem_of(client.get("/broken"), status_of(error), error.code)
    assert body["detail"] == "Expected one thing, found ? another. Do this."
    assert body["errors"] == [{"loc": ["a", "?", 1], "message": "?"}]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a private text"),
        KeyError("a private text"),
        OSError(5, "a private text"),
        ExceptionGroup("a private text", [ValueError("a private text")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_breaks_on_our_side_is_a_500_that_tells_nothing_and_a_log_without_texts(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    app = make_app(tmp_path / "data")

    @app.get("/broken")
    def broken() -> None:
        raise error

    with caplog.at_level(logging.DEBUG), TestClient(app, client=("127.0.0.1", 1)) as client:
        answer = client.get("/broken", headers={"x-request-id": "find-me"})
        body = problem_of(answer, 500, "internal")
        assert client.get("/healthz").status_code == 200
    assert body["request_id"] == "find-me"
    assert "private" not in answer.text
    logged = "\n".join(logging.Formatter().format(record) for record in caplog.records if record.name != "asyncio")
    assert "find-me" in logged
    assert type(error).__name__ in logged
    assert "in broken" in logged
    assert "a private text" not in logged


@pytest.mark.parametrize("path", ["/nothing", "/jobs/x/y/z", "/datasets//rows", "/%00", "/predict/x", "/Jobs"])
def test_an_unknown_path_is_a_404_problem(shared: TestClient, path: str) -> None:
    problem_of(shared.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", "POST"),
        ("PATCH", "/jobs", "POST"),
        ("DELETE", "/aliases", "GET"),
        ("PUT", "/jobs/x", "GET"),
        ("POST", "/healthz", "GET"),
        ("BREW", "/jobs", "POST"),
    ],
)
def test_a_method_that_is_not_offered_is_a_405_problem(
    shared: TestClient, method: str, path: str, allowed: str
) -> None:
    answer = shared.request(method, path)
    problem_of(answer, 405, "method_not_allowed")
    assert allowed in answer.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/jobs", "/docs", "/openapi.json", "/metrics", "/nothing", "/"]
)
def test_every_answer_carries_a_request_id(shared: TestClient, path: str) -> None:
    first, second = (shared.get(path).headers["x-request-id"] for _ in range(2))
    assert first.startswith("req_")
    assert first != second


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2_X", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False), ("é", False)],
)
def test_a_callers_request_id_is_kept_if_it_is_a_plain_one(shared: TestClient, given: str, kept: bool) -> None:
    answer = shared.get("/nothing", headers={"x-request-id": given.encode("latin-1")})  # type: ignore[dict-item]
    assert (answer.headers["x-request-id"] == given) is kept
    assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
    problem_of(answer, 404, "not_found")


def test_metrics_count_routes_and_statuses_and_hold_nothing_anybody_wrote(start: Start) -> None:
    client = start()
    ctx = client.app.state.context  # type: ignore[attr-defined]
    add_published(ctx.db, ctx.storage)
    add_job(ctx.db)
    for method, path in (
        ("GET", "/jobs/job_private"),
        ("GET", "/private"),
        ("PRIVATE", "/jobs"),
        ("PUT", "/aliases/private"),
    ):
        client.request(method, path, headers={"x-request-id": "private"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "rivate" not in answer.text.lower().replace("private_", "")
    assert 'tuneproof_requests_total{method="GET",route="/jobs/{job_id}",status="404"} 1.0' in answer.text
    assert 'tuneproof_jobs{status="queued"} 1.0' in answer.text
    assert 'tuneproof_jobs{status="succeeded"} 1.0' in answer.text
    assert "tuneproof_engine_up 1.0" in answer.text


def test_a_service_that_cannot_work_says_what_is_missing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start()
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["checks"]["storage"]) == (200, "ok")
    assert "tuneproof worker" in ready.json()["checks"]["workers"]

    def away(_storage: Storage) -> None:
        raise OSError("/secret/path is away")

    monkeypatch.setattr(Storage, "probe", away)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "not_ready")
    assert answer.json()["checks"]["storage"].startswith("cannot be reached (OSError). ")
    assert "/secret/path" not in answer.text
    assert answer.headers["retry-after"]
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("when", "words"), [("at once", "will not come back: restart the API"), ("as it stops", "broke as it was stopped")]
)
def test_a_room_that_ends_by_an_error_is_told_in_the_log(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, when: str, words: str
) -> None:
    app, told = make_app(tmp_path / "data"), []

    async def run(_warm: Any = ()) -> None:
        try:
            await asyncio.sleep(0 if when == "at once" else 60)
        finally:
            raise ValueError("a private text")

    app.state.context.engine.run = run
    with caplog.at_level(logging.CRITICAL, "tuneproof.api"), TestClient(app) as client:
        client.get("/healthz")
        told = [record.getMessage() for record in caplog.records]
    [said] = told or [record.getMessage() for record in caplog.records]
    assert bool(told) is (when == "at once")
    assert words in said
    assert "ValueError" in said
    assert "private" not in said


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (psycopg.errors.DeadlockDetected, "being written to"), (psycopg.errors.LockNotAvailable, "being written to"),
        (psycopg.errors.AdminShutdown, "did not answer"),
    ],
)  # fmt: skip
def test_a_row_that_others_hold_is_not_told_as_a_server_that_is_away(cause: type[Exception], words: str) -> None:
    answer = crashed(Request({"type": "http"}), OperationalError("UPDATE", None, cause()))
    assert answer.status_code == 503
    assert words in bytes(answer.body).decode()


class EnoughError(BaseException):
    """Ends what goes on after every Exception."""


def test_housekeeping_goes_on_after_an_error_and_forgets_at_every_twelfth_round(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service import main

    rounds: list[bool] = []

    def broken(_context: Any, forgets: bool) -> None:
        rounds.append(forgets)
        raise OSError("the database is away") if len(rounds) < 25 else EnoughError

    monkeypatch.setattr(main, "_round", broken)
    monkeypatch.setattr(main, "_SECONDS_BETWEEN_ROUNDS", 0)
    with pytest.raises(EnoughError):
        asyncio.run(main._housekeeping(make_app(tmp_path / "data").state.context))
    assert [number for number, forgets in enumerate(rounds) if forgets] == [0, 12, 24]


def test_while_the_database_is_away_nobody_could_renew_so_housekeeping_gives_them_a_lease_more(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service import main

    clock, ticks, asked = StillClock(), [0.0], []
    ctx = make_app(tmp_path / "data", clock=clock).state.context
    ctx.steady = Steadiness(clock, 30, lambda: ticks[0])

    def due(*_given: Any) -> list[Any]:
        asked.append(ctx.steady())
        ticks[0] += 20
        clock.advance(20)
        raise OperationalError("SELECT", None, Exception("connection refused")) if len(asked) < 4 else EnoughError

    monkeypatch.setattr(garbage, "due", due)
    monkeypatch.setattr(main, "_SECONDS_BETWEEN_ROUNDS", 0)
    ticks[0] += 31
    clock.advance(31)
    with pytest.raises(EnoughError):
        asyncio.run(main._housekeeping(ctx))
    assert asked == [True, False, False, False]


def test_garbage_is_deleted_after_its_grace_and_one_that_cannot_be_holds_nothing_up(tmp_path: Any) -> None:
    clock = StillClock()
    app = make_app(tmp_path / "data", clock=clock)
    ctx = app.state.context
    for _ in range(2):
        add_job(ctx.db)
        lease = claim(ctx.db).lease
        (tmp_path / "data" / "storage" / lease.prefix).mkdir(parents=True)
        jobs.fail(ctx.db, lease, {"code": "internal", "message": "", "hint": None}, clock.now, GRACE)
    job_folders = sorted((tmp_path / "data" / "storage" / "jobs").glob("*/*"))
    real = ctx.storage.delete

    def delete(prefix: str) -> None:
        if prefix.startswith(f"jobs/{job_folders[0].parent.name}"):
            raise OSError("read-only")
        real(prefix)

    ctx.storage.delete = delete
    _round(ctx)
    assert all(folder.exists() for folder in job_folders)
    clock.now += GRACE + timedelta(seconds=1)
    _round(ctx)
    assert [folder.exists() for folder in job_folders] == [True, False]
    ctx.storage.delete = real
    clock.now += timedelta(minutes=1)
    _round(ctx)
    assert not job_folders[0].exists()
    assert garbage.due(ctx.db, clock.now) == []


def test_of_a_storage_that_is_away_each_round_asks_once(tmp_path: Any) -> None:
    ctx = make_app(tmp_path / "data", clock=StillClock()).state.context
    with ctx.db.write() as session:
        for number in range(3):
            garbage.discard(session, f"jobs/{number}", ctx.clock())
    ctx.storage.delete = mock.Mock(side_effect=StorageUnavailable("The storage does not answer."))
    _round(ctx)
    assert ctx.storage.delete.call_count == 1
    assert len(garbage.due(ctx.db, ctx.clock())) == 3


def test_a_hundred_that_cannot_be_deleted_hold_nothing_up(tmp_path: Any) -> None:
    clock = StillClock()
    ctx = make_app(tmp_path / "data", clock=clock).state.context
    with ctx.db.write() as session:
        for number in range(250):
            garbage.discard(session, f"jobs/{number}", clock.now)
    deleted = []

    def delete(prefix: str) -> None:
        if int(prefix.rpartition("/")[2]) < 200:
            raise OSError("read-only")
        deleted.append(prefix)

    ctx.storage.delete = delete
    for _ in range(3):
        _round(ctx)
    assert len(deleted) == 50


def test_what_a_killed_process_left_of_an_upload_is_deleted_a_day_later(tmp_path: Any) -> None:
    clock = StillClock()
    ctx = make_app(tmp_path / "data", clock=clock).state.context
    old, new = (tmp_path / "data" / "tmp" / name for name in ("old", "new"))
    for file, age_seconds in ((old, 90_000), (new, 80_000)):
        file.write_bytes(b"text,label")
        os.utime(file, (clock.now.timestamp() - age_seconds,) * 2)
    _round(ctx)
    assert [file.exists() for file in (old, new)] == [False, True]


TABLE = b"text,label\n" + b"".join(b"text number %d,%s\n" % (i, (b"fee", b"refund")[i % 2]) for i in range(12))


def test_an_upload_cut_off_between_its_bytes_and_its_row_is_collected(tmp_path: Any) -> None:
    clock = StillClock()
    app = make_app(tmp_path / "data", clock=clock)
    ctx = app.state.context
    with TestClient(app, client=("127.0.0.1", 1), raise_server_exceptions=False) as client:
        with mock.patch("service.db.garbage.named", side_effect=KeyError), mock.patch("service.db.garbage.give_up"):
            answer = client.post("/datasets", files={"file": TABLE})
        assert answer.status_code == 500
        [file] = [path for path in (tmp_path / "data" / "storage").rglob("*") if path.is_file()]
        _round(ctx)
        assert file.exists()
        clock.now += garbage.UNNAMED
        _round(ctx)
        assert not file.exists()


@pytest.mark.parametrize("full", ["storage", pytest.param("database", marks=sqlite_only)])
def test_a_disk_that_fills_while_an_upload_is_stored_is_507_and_nothing_is_kept(tmp_path: Any, full: str) -> None:
    app = make_app(tmp_path / "data")
    ctx = app.state.context
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        if full == "storage":
            with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
                answer = client.post("/datasets", files={"file": TABLE})
        else:
            with ctx.db.engine.connect() as connection:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

            def limit(connection: Any, _record: Any, _proxy: Any) -> None:
                connection.execute(f"PRAGMA max_page_count = {pages}")

            event.listen(ctx.db.engine, "checkout", limit)
            for number in range(300):
                answer = client.post("/datasets", files={"file": (f"{number}.csv", TABLE)})
                if answer.status_code != 201:
                    break
        assert "disk is full" in problem_of(answer, 507, "low_disk")["detail"]
        assert answer.headers["retry-after"]
        listed = client.get("/datasets", params={"limit": 200}).json()["data"]
        for dataset in listed:
            assert client.get(f"/datasets/{dataset['id']}/rows").json()["data"]
        files = [path for path in (tmp_path / "data" / "storage").rglob("*") if path.is_file()]
        assert full == "database" or files == listed == []


def test_no_answer_may_be_framed_or_guessed_at(tmp_path: Any) -> None:
    with TestClient(make_app(tmp_path / "data"), client=("127.0.0.1", 1)) as client:
        for path in ("/docs", "/healthz", "/nothing", "/ui/", "/datasets"):
            headers = client.get(path).headers
            assert headers.get_list("x-frame-options") == ["DENY"]
            assert headers.get_list("x-content-type-options") == ["nosniff"]
