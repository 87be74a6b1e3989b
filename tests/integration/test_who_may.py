"""Every route the application has, whether its OpenAPI document lists it or not, and what a web page can make of it.

What each kind of key may do on each route is in test_api_auth.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.db import catalog, jobs
from service.db.models import ApiKey, Dataset, Job, Model
from tests.integration.conftest import ELSEWHERE, api
from tests.integration.test_api_auth import NEEDS
from tests.integration.test_api_session import FROM_ELSEWHERE
from tests.problems import problem_of
from tests.routes import routes_of
from tests.rows import START, add_published

Start = Callable[..., TestClient]
# What anybody may read: the pages and the reference hold nothing of anybody's.
PAGES = {
    ("GET", "/"), ("GET", "/docs"), ("GET", "/docs/oauth2-redirect"), ("GET", "/openapi.json"),
    ("HEAD", "/openapi.json"), ("GET", "/ui/{path}"), ("GET", "/static-offline-docs/{path}"),
}  # fmt: skip
STRANGE_HOSTS = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example")
GUARDED = sorted(route for route, needed in NEEDS.items() if needed is not None)
CHANGING = [route for route in GUARDED if route[0] != "GET"]


def named(route: tuple[str, str], **names: str) -> tuple[str, str]:
    """The route with something in each of its places."""
    method, path = route
    for place in ("dataset_id", "job_id", "model_id", "key_id", "alias", "name"):
        path = path.replace(f"{{{place}:path}}", names.get(place, "x")).replace(f"{{{place}}}", names.get(place, "x"))
    return method, path.replace("{path}", "index.html" if path.startswith("/ui") else "swagger-ui.css")


class House:
    """An API with something of everything in it."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.context = client.app.state.context  # type: ignore[attr-defined]
        self.job, self.model = add_published(self.context.db, self.context.storage)
        with self.context.db.read() as session:
            self.dataset = jobs.get(session, self.job).dataset_id
        with self.context.db.write() as session:
            catalog.point_alias(session, "live", self.model, START)
        self.names = {"job_id": self.job, "model_id": self.model, "dataset_id": self.dataset, "alias": "live"}

    def holds(self) -> dict[str, list[str]]:
        with self.context.db.read() as session:
            tables: tuple[Any, ...] = (Dataset, Job, Model, ApiKey)
            rows = {table.__tablename__: catalog.newest(session, table, 200, None)[0] for table in tables}
            return {name: [row.id for row in found] for name, found in rows.items()} | {
                "aliases": [alias.model_id for alias in catalog.list_aliases(session)]
            }

    def sends(self, route: tuple[str, str], **headers: str) -> httpx.Response:
        """A call that would go through, was it not for who sends it."""
        method, path = named(route, **self.names)
        bodies: dict[str, Any] = {
            "/datasets": {"files": {"file": ("a.csv", "text,label\n" + "".join(f"{i},{i % 2}\n" for i in range(60)))}},
            "/jobs": {"json": {"dataset_id": self.dataset}}, "/keys": {"json": {"name": "k", "scope": "admin"}},
            "/aliases/live": {"json": {"model_id": self.model, "force": True}},
            "/predict": {"json": {"model": self.model, "text": "hello"}},
        }  # fmt: skip
        return self.client.request(
            method, path, headers=headers, **(bodies.get(path, {}) if method != "DELETE" else {})
        )


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """On loopback, and no key was ever made: whoever is on this machine may do everything."""
    with api(tmp_path_factory.mktemp("keyless") / "data") as client:
        yield House(client)


@pytest.fixture(scope="module")
def signed_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Beyond loopback, in a browser that has signed in."""
    with api(tmp_path_factory.mktemp("signed") / "data", client=ELSEWHERE) as client:
        house = House(client)
        with house.context.db.write() as session:
            secret = catalog.create_key(session, "me", "admin", START)[1]
        assert client.post("/session", json={"key": secret}).status_code == 204
        yield house


def test_every_route_there_is_says_who_may(keyless: House) -> None:
    listed = {(method, path.replace("/{name}", "/{name:path}")) for method, path in NEEDS}
    assert routes_of(keyless.client.app) == listed | PAGES  # type: ignore[arg-type]


@pytest.mark.parametrize("route", sorted(PAGES), ids=" ".join)
def test_pages_and_reference_ask_for_no_key_and_are_not_told_apart_by_a_bad_one(start: Start, route: Any) -> None:
    client = start(client=ELSEWHERE)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"host": "evil.example"}):
        assert client.request(*named(route), headers=headers).status_code in (200, 307)


def test_no_other_method_goes_around_the_key(start: Start) -> None:
    client = start(client=ELSEWHERE)
    known = set(NEEDS) | PAGES
    for _method, path in GUARDED:
        for method in ("HEAD", "OPTIONS", "TRACE", "PATCH", "PUT", "POST", "DELETE", "CONNECT", "SEARCH"):
            if (method, path) not in known:
                answer = client.request(*named((method, path)))
                assert answer.status_code in (401, 405), f"{method} {path}: {answer.status_code}"
                assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_without_keys_no_web_page_can_do_or_read_anything(keyless: House, route: tuple[str, str]) -> None:
    """Neither one of another site, nor one whose own domain name was made to resolve to this machine."""
    before = keyless.holds()
    for host in STRANGE_HOSTS:
        problem_of(keyless.sends(route, host=host), 401, "unauthorized")
        own = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        problem_of(keyless.sends(route, **own), 401, "unauthorized")
    for headers in FROM_ELSEWHERE:
        problem_of(keyless.sends(route, **headers), 401, "unauthorized")
    assert keyless.holds() == before


@pytest.mark.parametrize("route", CHANGING, ids=" ".join)
def test_with_a_cookie_no_other_sites_page_changes_anything(signed_in: House, route: tuple[str, str]) -> None:
    before = signed_in.holds()
    for headers in FROM_ELSEWHERE:
        problem_of(signed_in.sends(route, **headers), 403, "forbidden")
    assert signed_in.holds() == before


def test_what_the_pages_were_kept_from_would_have_gone_through(tmp_path: Path) -> None:
    """Else the tests above say nothing: the same calls, from this machine."""
    with api(tmp_path / "data") as client:
        house = House(client)
        # At the very end what closes the door to those without a key.
        first = [route for route in CHANGING if route[0] != "DELETE" and route[1] != "/keys"]
        for route in [*first, *(route for route in CHANGING if route[0] == "DELETE"), ("POST", "/keys")]:
            answer = house.sends(route)
            assert answer.status_code in (200, 201, 202, 204, 404, 409, 503), f"{route}: {answer.text}"


@pytest.mark.parametrize("route", sorted({*NEEDS, *PAGES}), ids=" ".join)
def test_no_answer_can_be_framed_or_taken_for_another_type(keyless: House, route: tuple[str, str]) -> None:
    for host in ("127.0.0.1", "evil.example"):
        method, path = named(route, alias="live")
        answer = keyless.client.request(method, path, headers={"host": host})
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_the_report_and_every_other_file_of_a_job_run_nothing_and_load_nothing(keyless: House) -> None:
    files = [f"/jobs/{keyless.job}/report"]
    files += [artifact["url"] for artifact in keyless.client.get(f"/jobs/{keyless.job}").json()["artifacts"]]
    assert len(files) > 4
    for path in files:
        policy = keyless.client.get(path).headers["content-security-policy"]
        assert {part.strip() for part in policy.split(";")} == {
            "default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", "sandbox"
        }  # fmt: skip
    assert keyless.client.get("/ui/").headers["referrer-policy"] == "same-origin"
