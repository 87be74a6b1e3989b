"""Who may do what: every route with every kind of key, and nobody but loopback where there is none."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from service.__main__ import main
from service.db import catalog
from service.db.engine import Database
from service.db.models import ApiKey
from tests.databases import database_url
from tests.integration.conftest import ELSEWHERE, api, listening, make_app
from tests.problems import problem_of
from tests.rows import START, StillClock

Start = Callable[..., TestClient]
SCOPES = ("predict", "read", "write", "admin")

# Written out by hand: a new route must say here what it needs.
NEEDS: dict[tuple[str, str], str | None] = {
    ("GET", "/healthz"): None,
    ("GET", "/readyz"): None,
    ("GET", "/metrics"): "read",
    ("POST", "/datasets"): "write",
    ("GET", "/datasets"): "read",
    ("GET", "/datasets/{dataset_id}"): "read",
    ("GET", "/datasets/{dataset_id}/rows"): "read",
    ("GET", "/datasets/{dataset_id}/preflight"): "read",
    ("DELETE", "/datasets/{dataset_id}"): "write",
    ("POST", "/jobs"): "write",
    ("GET", "/jobs"): "read",
    ("GET", "/jobs/{job_id}"): "read",
    ("DELETE", "/jobs/{job_id}"): "write",
    ("GET", "/jobs/{job_id}/wait"): "read",
    ("POST", "/jobs/{job_id}/cancel"): "write",
    ("POST", "/jobs/{job_id}/retry"): "write",
    ("GET", "/jobs/{job_id}/events"): "read",
    ("GET", "/jobs/{job_id}/report"): "read",
    ("GET", "/jobs/{job_id}/artifacts/{name}"): "read",
    ("GET", "/jobs/{job_id}/flips"): "read",
    ("GET", "/compare"): "read",
    ("GET", "/models"): "read",
    ("GET", "/models/{model_id}"): "read",
    ("GET", "/models/{model_id}/download"): "read",
    ("DELETE", "/models/{model_id}"): "write",
    ("GET", "/aliases"): "read",
    ("GET", "/aliases/{alias}/history"): "read",
    ("GET", "/aliases/{alias}/gate"): "read",
    ("PUT", "/aliases/{alias}"): "write",
    ("DELETE", "/aliases/{alias}"): "write",
    ("POST", "/predict"): "predict",
    ("GET", "/base-models"): "read",
    ("GET", "/keys"): "admin",
    ("POST", "/keys"): "admin",
    ("DELETE", "/keys/{key_id}"): "admin",
    ("GET", "/session"): None,
    ("POST", "/session"): None,
    ("DELETE", "/session"): None,
}
GUARDED = [route for route, needed in NEEDS.items() if needed is not None]
# Signing in asks for a key in its own way: test_api_session.py.
OPEN = [route for route, needed in NEEDS.items() if needed is None and route[1] != "/session"]


def call(client: TestClient, route: tuple[str, str], key: str | None = None) -> Any:
    method, path = route
    for name in ("dataset_id", "job_id", "model_id", "key_id", "alias", "name"):
        path = path.replace(f"{{{name}}}", "x")
    return client.request(method, path, headers={"authorization": f"Bearer {key}"} if key is not None else {})


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """An API with a key of every scope, one that was revoked and one that has expired."""
    with api(tmp_path_factory.mktemp("auth") / "data", clock=StillClock(), client=ELSEWHERE) as client:
        db: Database = client.app.state.context.db  # type: ignore[attr-defined]
        keys = {}
        with db.write() as session:
            for scope in SCOPES:
                keys[scope] = catalog.create_key(session, scope, scope, START)[1]
            revoked, keys["revoked"] = catalog.create_key(session, "revoked", "admin", START)
            keys["expired"] = catalog.create_key(session, "old", "admin", START, START - timedelta(seconds=1))[1]
            session.flush()
            catalog.revoke_key(session, revoked.id, START)
        yield client, keys


def test_every_route_says_here_what_it_needs(locked: tuple[TestClient, dict[str, str]]) -> None:
    paths = locked[0].get("/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found == set(NEEDS)


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_without_a_good_key_a_route_is_401(locked: tuple[TestClient, dict[str, str]], route: tuple[str, str]) -> None:
    client, keys = locked
    bad = [None, "", "x", "tp_" + "x" * 43, keys["revoked"], keys["expired"], keys["admin"][:-1], keys["admin"] + "x",
           hashlib.sha256(keys["admin"].encode()).hexdigest(), "é\xff"]  # fmt: skip
    for key in bad:
        body = problem_of(call(client, route, key.encode("latin-1") if key else key), 401, "unauthorized")  # type: ignore[arg-type]
        assert "tuneproof keys create" in body["detail"]
    method, path = route
    for header in (keys["admin"], f"Basic {keys['admin']}", f"Token {keys['admin']}", "Bearer"):
        problem_of(client.request(method, path, headers={"authorization": header}), 401, "unauthorized")


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_a_key_reaches_as_far_as_its_scope(locked: tuple[TestClient, dict[str, str]], route: tuple[str, str]) -> None:
    client, keys = locked
    needed = NEEDS[route]
    assert needed is not None
    for scope in SCOPES:
        answer = call(client, route, keys[scope])
        if SCOPES.index(scope) < SCOPES.index(needed):
            assert f"'{needed}'" in problem_of(answer, 403, "forbidden")["detail"]
        else:
            assert answer.status_code not in (401, 403), answer.text


@pytest.mark.parametrize("route", OPEN, ids=" ".join)
def test_an_open_route_asks_for_no_key(locked: tuple[TestClient, dict[str, str]], route: tuple[str, str]) -> None:
    for key in (None, "wrong", locked[1]["revoked"]):
        assert call(locked[0], route, key).status_code == 200


def test_readiness_is_told_in_words_only_to_a_key(locked: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = locked
    for key in (None, "wrong", keys["expired"]):
        assert call(client, ("GET", "/readyz"), key).json() == {"status": "ready"}
    checks = call(client, ("GET", "/readyz"), keys["predict"]).json()["checks"]
    assert set(checks) == {"database", "storage", "engine", "workers", "disk", "versions"}


def test_a_key_is_checked_before_the_body_is(locked: tuple[TestClient, dict[str, str]]) -> None:
    for path in ("/jobs", "/predict", "/datasets"):
        problem_of(locked[0].post(path, content=b"{" * 1000), 401, "unauthorized")


def test_the_word_bearer_may_be_written_in_any_case(locked: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = locked
    for header in (f"bearer {keys['read']}", f"BEARER  {keys['read']} "):
        assert client.get("/jobs", headers={"authorization": header}).status_code == 200


# No key at all ------------------------------------------------------------------------------------
@pytest.mark.parametrize("client", [("127.0.0.1", 1), ("127.8.8.8", 1), ("::1", 1)])
def test_with_no_key_loopback_may_do_everything(start: Start, client: tuple[str, int]) -> None:
    started = start(client=client)
    for route in GUARDED:
        assert call(started, route).status_code not in (401, 403), route
    problem_of(started.get("/jobs", headers={"authorization": "Bearer x"}), 401, "unauthorized")


@pytest.mark.parametrize(
    "client", [ELSEWHERE, ("10.0.0.1", 1), ("2001:db8::1", 1), ("::ffff:203.0.113.7", 1), ("0.0.0.0", 1)]
)
def test_with_no_key_nobody_else_may_do_anything(start: Start, client: tuple[str, int]) -> None:
    started = start(client=client)
    for route in GUARDED:
        problem_of(call(started, route), 401, "unauthorized")
    assert started.get("/healthz").status_code == 200
    assert started.get("/readyz").json() == {"status": "ready"}


def test_the_first_key_closes_the_door_behind_loopback(start: Start) -> None:
    client = start()
    assert client.get("/jobs").status_code == 200
    db = client.app.state.context.db  # type: ignore[attr-defined]
    with db.write() as session:
        key, secret = catalog.create_key(session, "me", "read", START)
    problem_of(client.get("/jobs"), 401, "unauthorized")
    assert client.get("/jobs", headers={"authorization": f"Bearer {secret}"}).status_code == 200
    with db.write() as session:
        catalog.revoke_key(session, key.id, START)
    problem_of(client.get("/jobs"), 401, "unauthorized")


def test_a_call_that_a_proxy_passed_on_is_not_taken_for_loopback(tmp_path: Path) -> None:
    with listening(make_app(tmp_path / "data")) as url:
        assert httpx.get(f"{url}/jobs").status_code == 200
        forwarded = httpx.get(f"{url}/jobs", headers={"x-forwarded-for": "203.0.113.7"})
        problem_of(forwarded, 401, "unauthorized")


def test_a_caller_without_a_network_address_is_not_on_this_machine(tmp_path: Path) -> None:
    """A proxy may pass on `unknown`, or a name."""
    with TestClient(make_app_on(tmp_path, ""), client=("unknown", 1)) as client:
        problem_of(client.get("/jobs"), 401, "unauthorized")


# The first key ------------------------------------------------------------------------------------
def test_a_bootstrap_key_is_the_first_admin_key_and_only_the_first(tmp_path: Path) -> None:
    secret = "a-first-key-for-containers"
    for given in (secret, secret, "another-one"):
        with TestClient(make_app_on(tmp_path, given), client=ELSEWHERE) as client:
            answer = client.delete("/jobs/job_0", headers={"authorization": f"Bearer {secret}"})
            problem_of(answer, 404, "not_found")
            other = client.get("/jobs", headers={"authorization": "Bearer another-one"})
            problem_of(other, 401, "unauthorized")
    db = Database(database_url(tmp_path))
    with db.read() as session:
        [key] = session.scalars(select(ApiKey)).all()
    db.close()
    assert (key.name, key.scope) == ("bootstrap", "admin")
    for file in tmp_path.glob("tuneproof.db*"):
        assert secret.encode() not in file.read_bytes()


def make_app_on(data_dir: Path, bootstrap_key: str) -> Any:
    """An application on what is already there."""
    from service.core.settings import Settings
    from service.main import create_app
    from tests.integration.conftest import QuietEngine

    given: Any = {"data_dir": data_dir, "database_url": database_url(data_dir), "min_free_bytes": 0}
    app = create_app(Settings(bootstrap_key=bootstrap_key, **given))  # type: ignore[arg-type]
    app.state.context.engine = QuietEngine()
    return app


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEPROOF_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("TUNEPROOF_BOOTSTRAP_KEY", raising=False)
    return tmp_path


def test_a_server_beyond_loopback_without_a_key_refuses_to_start_and_says_how(home: Path) -> None:
    command = [sys.executable, "-P", "-m", "service", "serve", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "tuneproof keys create" in ended.stderr
    assert "TUNEPROOF_BOOTSTRAP_KEY" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.7", "example.org", ""])
@pytest.mark.parametrize("bootstrap_key", [None, "", "  "])
def test_an_empty_bootstrap_key_opens_no_door(
    home: Path, monkeypatch: pytest.MonkeyPatch, host: str, bootstrap_key: str | None
) -> None:
    from service import server

    started: list[Any] = []
    monkeypatch.setattr(server, "run", lambda *given, **_: started.append(given))
    if bootstrap_key is not None:
        monkeypatch.setenv("TUNEPROOF_BOOTSTRAP_KEY", bootstrap_key)
    assert main(["serve", "--host", host, "--port", "0"]) == 2
    assert started == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_server_on_loopback_needs_no_key(home: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    from service import server

    started: list[Any] = []
    monkeypatch.setattr(server, "run", lambda *given, **named: started.append(named["host"]))
    assert main(["serve", "--host", host, "--port", "0"]) == 0
    assert started == [host]


def test_keys_are_made_listed_and_revoked_and_shown_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from service import server

    assert main(["keys", "create", "--name", "app", "--scope", "predict", "--expires-days", "30"]) == 0
    made = capsys.readouterr()
    secret, key_id = made.out.strip(), made.err.splitlines()[-1].split()[0]
    assert secret.startswith("tp_")
    assert secret not in made.err
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert secret not in listed
    assert all(word in listed for word in (key_id, "predict", "app", "expires"))
    assert main(["keys", "list", "--json"]) == 0
    [shown] = json.loads(capsys.readouterr().out)
    assert (shown["id"], shown["name"]) == (key_id, "app")
    assert shown["created_at"].endswith("Z"), "as in GET /keys"
    assert main(["keys", "revoke", key_id]) == 0
    assert main(["keys", "list"]) == 0
    assert "revoked" in capsys.readouterr().out
    assert main(["keys", "revoke", "key_0"]) == 2
    # Keys exist now, so nobody can walk in: the server may listen anywhere.
    monkeypatch.setattr(server, "run", lambda *_given, **_named: None)
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 0
