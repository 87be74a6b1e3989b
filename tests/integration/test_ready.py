"""`/readyz` in words: with a key it says what is wrong and what to do; without one, only whether it is ready."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio.to_thread
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service.api import operations
from service.db import catalog
from service.inference.wire import Figures
from tests.integration.conftest import ELSEWHERE
from tests.rows import START, add_published
from tests.waiting import until

Start = Callable[..., TestClient]


def context(client: TestClient) -> Any:
    return client.app.state.context  # type: ignore[attr-defined]


def checks(client: TestClient, status: int = 200) -> dict[str, Any]:
    answer = client.get("/readyz")
    assert answer.status_code == status, answer.text
    assert answer.json()["status"] == ("ready" if status == 200 else "not_ready")
    assert ("retry-after" in answer.headers) is (status == 503)
    found: dict[str, Any] = answer.json()["checks"]
    return found


def test_a_service_with_nothing_wrong_says_ok_and_names_its_workers(start: Start) -> None:
    client = start()
    catalog.saw_worker(context(client).db, "wrk_7", START, START)
    found = checks(client)
    assert {found[name] for name in ("database", "storage", "engine", "disk")} == {"ok"}
    assert found["workers"] == ["wrk_7"]


def test_a_name_to_preload_that_nobody_has_is_said_and_does_no_harm(start: Start) -> None:
    client = start(preload="live, mdl_0")
    words = checks(client)["engine"]
    assert "cannot preload 'live': no model has that id or alias" in words
    assert "'mdl_0'" in words
    ctx = context(client)
    _job, model_id = add_published(ctx.db, ctx.storage)
    with ctx.db.write() as session:
        catalog.point_alias(session, "live", model_id, START)
    assert "'live'" not in checks(client)["engine"]


def test_a_service_without_workers_is_ready_and_says_how_to_start_one(start: Start) -> None:
    assert "`tuneproof worker`" in checks(start())["workers"]


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"figures": None}, 503, "is starting"),
        ({"running": False}, 503, "is starting"),
        ({"running": False, "figures": None, "restarts": 3}, 503, "3 times"),
        ({"restarts": 1}, 200, "was lost and started again"),
        ({"figures": Figures(loading=["f2llm-0.6b"])}, 200, "is loading base model 'f2llm-0.6b'"),
        ({"_n_to_warm": 2, "figures": Figures(warmed=1, loading=["f2llm-0.6b"])}, 503, "is loading base model 'f2llm"),
        ({"_n_to_warm": 2, "figures": Figures(warmed=1)}, 503, "is loading the models that TUNEPROOF_PRELOAD names"),
        ({"_n_to_warm": 2, "figures": Figures(warmed=2)}, 200, "ok"),
        ({"figures": Figures(replicas=0, away="No replica. Start one.")}, 503, "No replica. Start one."),
        ({"figures": Figures(replicas=2)}, 200, "ok"),
        ({"figures": Figures(refused={"x": "It does not fit. Raise it."})}, 200, "It does not fit. Raise it."),
    ],
)
def test_the_engine_says_what_it_is_at(start: Start, given: dict[str, Any], status: int, words: str) -> None:
    client = start()
    for name, value in given.items():
        setattr(context(client).engine, name, value)
    assert words in checks(client, status)["engine"]


def test_a_full_disk_is_told_and_predictions_go_on(start: Start) -> None:
    client = start(min_free_bytes=2**60)
    assert "TUNEPROOF_MIN_FREE_BYTES" in checks(client)["disk"]


def test_a_database_that_was_put_back_from_an_older_version_is_told(start: Start) -> None:
    client = start()
    with context(client).db.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    assert "`tuneproof migrate`" in checks(client, 503)["database"]


def test_a_database_that_is_away_is_no_500_and_told_to_the_log(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = start()

    def away() -> None:
        raise OperationalError("SELECT canary", {}, OSError("postgresql://me:canary@db"))

    monkeypatch.setattr(context(client).db, "read", away)
    for headers in ({}, {"authorization": "Bearer tp_key"}):
        answer = client.get("/readyz", headers=headers)
        assert (answer.status_code, answer.json()) == (503, {"status": "not_ready"})
    assert "the database cannot be read (OperationalError)" in caplog.text
    # Where keys can still be told, it is said in words.
    monkeypatch.setattr(context(client), "keys_exist", lambda: False)
    assert checks(client, 503)["database"].startswith("cannot be read (OperationalError). ")


def test_without_a_key_only_the_status_is_told(start: Start) -> None:
    client = start(client=ELSEWHERE)
    context(client).engine.figures = None
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "not_ready"})


def test_a_storage_that_says_nothing_is_looked_at_once_however_many_ask(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, looks, answers = start(), list[int](), threading.Event()
    monkeypatch.setattr(operations, "_PROBE_SECONDS", 0.05)

    def probe() -> None:
        looks.append(1)
        assert answers.wait(60)

    monkeypatch.setattr(context(client).storage, "probe", probe)
    try:
        with ThreadPoolExecutor(8) as callers:
            for found in callers.map(lambda _: checks(client, 503), range(16)):
                assert found["storage"].startswith("has not answered for ")
        assert looks == [1]
    finally:
        answers.set()
    until(lambda: client.get("/readyz").status_code == 200, 10, "the store is back")
    assert checks(client)["storage"] == "ok"


def test_a_database_that_says_nothing_is_looked_at_once_however_many_ask(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, looks, answers = start(), list[int](), threading.Event()
    monkeypatch.setattr(operations, "_PROBE_SECONDS", 0.05)
    revisions = operations.revisions

    def looked(connection: Any) -> tuple[str | None, str]:
        looks.append(1)
        assert answers.wait(60)
        return revisions(connection)

    monkeypatch.setattr(operations, "revisions", looked)
    try:
        with ThreadPoolExecutor(8) as callers:
            said = list(callers.map(lambda _: client.get("/readyz"), range(16)))
        assert {answer.status_code for answer in said} == {503}
        assert not [answer for answer in said if "checks" in answer.json()], "whose key it is is not known"
        assert looks == [1]
    finally:
        answers.set()
    until(lambda: client.get("/readyz").status_code == 200, 10, "the database is back")


def test_where_every_thread_is_taken_it_still_says_that_it_is_up(start: Start) -> None:
    client, free = start(), threading.Event()

    async def threads() -> Any:
        return anyio.to_thread.current_default_thread_limiter()

    async def hold() -> bool:
        return await anyio.to_thread.run_sync(free.wait)

    assert client.portal is not None
    limiter = client.portal.call(threads)
    taken = [client.portal.start_task_soon(hold) for _ in range(int(limiter.total_tokens))]
    try:
        until(lambda: limiter.available_tokens == 0, 10, "all are taken")
        with ThreadPoolExecutor(1) as caller:
            asked = caller.submit(client.get, "/healthz")
            try:
                assert asked.result(10).json() == {"status": "ok"}
            finally:
                free.set()
    finally:
        free.set()
    assert all(one.result(10) for one in taken)
