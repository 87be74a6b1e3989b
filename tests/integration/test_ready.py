"""`/readyz` in words: with a key it says what is wrong and what to do; without one, only whether it is ready."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service.db import catalog
from service.inference.wire import Figures
from tests.integration.conftest import ELSEWHERE
from tests.rows import START, add_published

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
