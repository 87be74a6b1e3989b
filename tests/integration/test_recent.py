"""What calls remember from one to the next never gives stale authority: a test for each way it could."""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.api.recent import SECONDS, Recent
from service.db import catalog
from service.db.engine import Database
from tests.databases import database_url
from tests.problems import problem_of
from tests.rows import START, add_published

Start = Callable[..., TestClient]


class Ticks:
    """A monotonic clock moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def other(start: Start) -> Any:
    """An API, the same database as another process has it, and the clock of what the API remembers."""
    client = start()
    context = client.app.state.context  # type: ignore[attr-defined]
    ticks = context.recent._now = Ticks()
    database = Database(context.db.url)
    yield client, database, ticks
    database.close()


def keyed(database: Database, scope: str = "admin") -> tuple[str, dict[str, str]]:
    with database.write() as session:
        key, secret = catalog.create_key(session, scope, scope, START)
    return key.id, {"authorization": f"Bearer {secret}"}


def asked(client: TestClient, headers: dict[str, str], model: str = "mdl_none") -> httpx.Response:
    return client.post("/predict", json={"model": model, "text": "x"}, headers=headers)


def test_of_more_names_than_are_held_those_asked_for_last_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.recent._MOST", 3)
    with contextlib.closing(Database(database_url(tmp_path))) as database:
        recent, looked = Recent(database), []
        for name in "abcada":
            recent.get(name, lambda name=name: looked.append(name) or name)  # type: ignore[misc]
        assert [name for name in "abcd" if recent.held(name)] == ["a", "c", "d"]
        assert looked == ["a", "b", "c", "d"]


def test_a_key_revoked_by_this_process_counts_at_once(other: Any) -> None:
    client, database, _ticks = other
    _id, admin = keyed(database)
    key_id, headers = keyed(database, "predict")
    for _ in range(2):
        problem_of(asked(client, headers), 404, "not_found")
    assert client.delete(f"/keys/{key_id}", headers=admin).status_code == 204
    problem_of(asked(client, headers), 401, "unauthorized")


def test_a_key_revoked_by_another_process_counts_within_a_second(other: Any) -> None:
    client, database, ticks = other
    key_id, headers = keyed(database)
    problem_of(asked(client, headers), 404, "not_found")
    with database.write() as session:
        catalog.revoke_key(session, key_id, START)
    ticks.now += SECONDS
    assert SECONDS <= 1
    problem_of(asked(client, headers), 401, "unauthorized")


def test_a_key_that_expires_between_two_calls_is_refused(other: Any) -> None:
    client, database, _ticks = other
    clock = client.app.state.context.clock
    with database.write() as session:
        _key, secret = catalog.create_key(session, "k", "predict", START, expires_at=clock.now.replace(minute=59))
    headers = {"authorization": f"Bearer {secret}"}
    problem_of(asked(client, headers), 404, "not_found")
    clock.advance(3600)
    problem_of(asked(client, headers), 401, "unauthorized")


def test_the_first_key_shuts_the_door_for_callers_without_one(other: Any) -> None:
    client, database, ticks = other
    problem_of(asked(client, {}), 404, "not_found")
    keyed(database)
    ticks.now += SECONDS
    problem_of(asked(client, {}), 401, "unauthorized")


def test_an_alias_moved_counts_at_once_here_and_within_a_second_elsewhere(other: Any) -> None:
    client, database, ticks = other
    context = client.app.state.context
    first, second = (add_published(context.db, context.storage, name=name)[1] for name in ("one", "two"))
    served: list[str] = []

    async def predict(model: Any, _texts: list[str]) -> Any:
        served.append(model.id)
        raise RuntimeError

    context.engine.predict = predict
    for model_id in (first, second):
        client.put("/aliases/live", json={"model_id": model_id, "force": True})
        asked(client, {}, "live")
    with database.write() as session:
        catalog.point_alias(session, "live", first, START)
    ticks.now += SECONDS
    asked(client, {}, "live")
    assert served == [first, second, first]


def test_an_id_is_looked_up_once_until_some_model_is_deleted_by_whatever_process(
    other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, database, ticks = other
    context = client.app.state.context
    kept, gone = (add_published(context.db, context.storage, name=name)[1] for name in ("kept", "gone"))
    looked: list[str] = []
    find = catalog.find_model
    monkeypatch.setattr(catalog, "find_model", lambda session, name: looked.append(name) or find(session, name))

    async def predict(_model: Any, _texts: list[str]) -> Any:
        raise RuntimeError

    context.engine.predict = predict
    for _ in range(3):
        problem_of(asked(client, {}, gone), 500, "internal")
        problem_of(asked(client, {}, kept), 500, "internal")
        ticks.now += 100 * SECONDS
        with context.db.write():
            pass
    assert looked == [gone, kept]
    with database.write() as session:
        catalog.remove_model(session, gone, START, timedelta(0))
    ticks.now += SECONDS
    problem_of(asked(client, {}, gone), 404, "not_found")
    problem_of(asked(client, {}, kept), 500, "internal")
    assert looked == [gone, kept, gone, kept]


def test_what_was_looked_up_while_somebody_wrote_is_not_kept(tmp_path: Path) -> None:
    database = Database(database_url(tmp_path))
    recent = Recent(database, Ticks())

    def look() -> str:
        with database.write():
            return "before"

    assert recent.get("name", look) == "before"
    assert recent.held("name") is None
    assert recent.get("name", lambda: "after") == "after"
    assert recent.held("name") == "after"
    database.close()
