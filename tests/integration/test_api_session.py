"""Signing in: what the cookie opens, when it ends, and that no other site's page can use it."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from service.db import catalog
from service.db.engine import Database
from service.db.models import ApiKey, BrowserSession
from service.main import _round
from tests.integration.conftest import ELSEWHERE, api, make_app
from tests.problems import problem_of
from tests.rows import START, StillClock

Start = Callable[..., TestClient]
COOKIE = "tuneproof_session"
WEEK = 7 * 24 * 3600


class Signed:
    """An API beyond loopback, a key for it, and a browser that has signed in with the key."""

    def __init__(self, client: TestClient, clock: StillClock, scope: str = "write") -> None:
        self.client, self.clock = client, clock
        self.db: Database = client.app.state.context.db  # type: ignore[attr-defined]
        with self.db.write() as session:
            self.key, self.secret = catalog.create_key(session, "me", scope, clock())
        answer = client.post("/session", json={"key": self.secret})
        assert (answer.status_code, answer.content) == (204, b"")
        self.cookie = SimpleCookie(answer.headers["set-cookie"])[COOKIE]

    def sessions(self) -> int:
        with self.db.read() as session:
            return session.scalar(select(func.count()).select_from(BrowserSession)) or 0


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[Signed]:
    clock = StillClock()
    with api(tmp_path / "data", clock=clock, client=ELSEWHERE) as client:
        yield Signed(client, clock)


def test_the_cookie_counts_as_the_key_and_is_kept_from_scripts_and_other_sites(signed: Signed) -> None:
    cookie = signed.cookie
    assert (cookie["httponly"], cookie["samesite"], cookie["path"], cookie["domain"]) == (True, "strict", "/", "")
    assert (cookie["max-age"], cookie["secure"]) == (str(WEEK), "")
    assert signed.client.get("/jobs").status_code == 200
    problem_of(signed.client.delete("/jobs/x"), 404, "not_found")
    me = signed.client.get("/session").json()
    assert me == {"scope": "write", "key": {"id": signed.key.id, "name": "me"}, "keys_exist": True}
    assert signed.client.get("/readyz").json()["checks"]


def test_the_cookie_reaches_no_further_than_its_key(tmp_path: Path) -> None:
    with api(tmp_path / "data", client=ELSEWHERE) as client:
        Signed(client, StillClock(), "read")
        problem_of(client.delete("/jobs/x"), 403, "forbidden")


def test_the_cookie_is_not_the_key_and_is_nowhere_in_the_database(signed: Signed, tmp_path: Path) -> None:
    token = signed.cookie.value
    assert token != signed.secret
    problem_of(signed.client.get("/jobs", headers={"authorization": f"Bearer {token}"}), 401, "unauthorized")
    signed.client.cookies.clear()
    as_cookie = signed.client.get("/jobs", headers={"cookie": f"{COOKIE}={signed.secret}"})
    problem_of(as_cookie, 401, "unauthorized")
    for file in (tmp_path / "data").glob("tuneproof.db*"):
        assert token.encode() not in file.read_bytes()


def test_over_https_the_cookie_is_never_sent_without_it(tmp_path: Path) -> None:
    with TestClient(make_app(tmp_path / "data"), base_url="https://testserver", client=ELSEWHERE) as client:
        assert Signed(client, StillClock()).cookie["secure"] is True
        assert client.get("/jobs").status_code == 200


def test_behind_a_proxy_that_is_not_trusted_the_browser_says_that_it_came_by_https(signed: Signed) -> None:
    for origin, secure in (("https://testserver", True), ("http://testserver", "")):
        answer = signed.client.post("/session", json={"key": signed.secret}, headers={"origin": origin})
        assert SimpleCookie(answer.headers["set-cookie"])[COOKIE]["secure"] == secure


def test_it_works_behind_a_proxy_that_adds_a_prefix(tmp_path: Path) -> None:
    with TestClient(make_app(tmp_path / "data"), root_path="/tuneproof", client=ELSEWHERE) as client:
        assert Signed(client, StillClock()).cookie["path"] == "/"
        assert client.get("/tuneproof/jobs").status_code == 200


@pytest.mark.parametrize("bad", ["", "x", "tp_" + "x" * 43])
def test_a_bad_key_signs_nobody_in(signed: Signed, bad: str) -> None:
    signed.client.cookies.clear()
    answer = signed.client.post("/session", json={"key": bad})
    problem_of(answer, 401 if bad else 422, "unauthorized" if bad else "invalid_input")
    assert "set-cookie" not in answer.headers
    assert signed.sessions() == 1


@pytest.mark.parametrize("body", [{}, {"key": None}, {"key": "x" * 1001}, {"key": "x", "more": 1}, ["x"]])
def test_a_body_that_is_no_sign_in_is_refused_without_repeating_it(signed: Signed, body: Any) -> None:
    assert "xxx" not in str(problem_of(signed.client.post("/session", json=body), 422, "invalid_input"))


def test_a_revoked_or_expired_key_signs_nobody_in(signed: Signed) -> None:
    with signed.db.write() as session:
        old = catalog.create_key(session, "old", "admin", START, START - timedelta(seconds=1))[1]
        gone, revoked = catalog.create_key(session, "gone", "admin", START)
        session.flush()
        catalog.revoke_key(session, gone.id, START)
    for secret in (old, revoked):
        problem_of(signed.client.post("/session", json={"key": secret}), 401, "unauthorized")


# When it ends -------------------------------------------------------------------------------------
def test_signing_out_ends_it_on_both_sides(signed: Signed) -> None:
    answer = signed.client.delete("/session")
    assert (answer.status_code, signed.sessions()) == (204, 0)
    assert SimpleCookie(answer.headers["set-cookie"])[COOKIE]["max-age"] == "0"
    assert COOKIE not in signed.client.cookies
    again = signed.client.get("/jobs", headers={"cookie": f"{COOKIE}={signed.cookie.value}"})
    problem_of(again, 401, "unauthorized")
    assert signed.client.delete("/session").status_code == 204


def test_revoking_the_key_ends_it(signed: Signed) -> None:
    with signed.db.write() as session:
        catalog.revoke_key(session, signed.key.id, START)
    problem_of(signed.client.get("/jobs"), 401, "unauthorized")
    problem_of(signed.client.get("/session"), 401, "unauthorized")


def test_the_end_of_the_key_ends_it(signed: Signed) -> None:
    with signed.db.write() as session:
        session.get_one(ApiKey, signed.key.id).expires_at = START + timedelta(seconds=5)
    signed.clock.advance(4)
    assert signed.client.get("/jobs").status_code == 200
    signed.clock.advance(1)
    problem_of(signed.client.get("/jobs"), 401, "unauthorized")


def test_it_ends_after_seven_days_and_housekeeping_forgets_it(signed: Signed) -> None:
    context = signed.client.app.state.context  # type: ignore[attr-defined]
    signed.clock.advance(WEEK - 1)
    _round(context)
    assert (signed.client.get("/jobs").status_code, signed.sessions()) == (200, 1)
    signed.clock.advance(1)
    problem_of(signed.client.get("/jobs"), 401, "unauthorized")
    _round(context)
    assert signed.sessions() == 0


def test_signing_in_again_drops_the_session_before(signed: Signed) -> None:
    assert signed.client.post("/session", json={"key": signed.secret}).status_code == 204
    assert signed.sessions() == 1
    before = signed.client.get("/jobs", headers={"cookie": f"{COOKIE}={signed.cookie.value}"})
    problem_of(before, 401, "unauthorized")


def test_it_outlives_a_restart(signed: Signed, tmp_path: Path) -> None:
    app = make_app(tmp_path / "data", fresh=False)
    with TestClient(app, client=ELSEWHERE, cookies={COOKIE: signed.cookie.value}) as client:
        assert client.get("/session").json()["key"]["name"] == "me"


# Which of several counts --------------------------------------------------------------------------
def test_the_header_wins_over_the_cookie(signed: Signed) -> None:
    with signed.db.write() as session:
        small = catalog.create_key(session, "small", "predict", START)[1]
    problem_of(signed.client.get("/jobs", headers={"authorization": f"Bearer {small}"}), 403, "forbidden")
    problem_of(signed.client.get("/jobs", headers={"authorization": "Bearer wrong"}), 401, "unauthorized")
    # What a proxy's own password leaves there is not ours to judge.
    assert signed.client.get("/jobs", headers={"authorization": "Basic dTpw"}).status_code == 200


def test_without_keys_loopback_is_told_that_there_are_none(start: Start) -> None:
    client = start()
    none = {"scope": "admin", "key": None, "keys_exist": False}
    assert client.get("/session").json() == none
    assert client.get("/session", headers={"cookie": f"{COOKIE}=of-another-data-folder"}).json() == none
    problem_of(client.post("/session", json={"key": "tp_x"}), 401, "unauthorized")


def test_nobody_else_is_told_anything(start: Start) -> None:
    problem_of(start(client=ELSEWHERE).get("/session"), 401, "unauthorized")


# Other sites' pages -------------------------------------------------------------------------------
FROM_ELSEWHERE = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "origin": "http://testserver"},
    {"sec-fetch-site": "unheard-of"},
    {"origin": "http://evil.example"},
    {"origin": "http://testserver.evil.example"},
    {"origin": "http://testserver:8000"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://[testserver"},
]
FROM_HERE = [
    {},
    {"sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none"},
    {"sec-fetch-site": "same-origin", "origin": "https://as-the-proxy-is-called.example"},
    {"origin": "http://testserver"},
    {"origin": "https://TESTSERVER"},
]
CHANGES = [("POST", "/jobs"), ("POST", "/datasets"), ("DELETE", "/jobs/x"), ("PUT", "/aliases/a"), ("POST", "/predict")]


@pytest.mark.parametrize("route", CHANGES, ids=" ".join)
def test_with_the_cookie_our_own_pages_may_change_something_and_another_sites_may_not(
    signed: Signed, route: tuple[str, str]
) -> None:
    for headers in FROM_ELSEWHERE:
        problem_of(signed.client.request(*route, headers=headers), 403, "forbidden")
    for headers in FROM_HERE:
        assert signed.client.request(*route, headers=headers).status_code not in (401, 403), headers


def test_with_a_key_in_the_header_the_page_does_not_matter(signed: Signed) -> None:
    for headers in FROM_ELSEWHERE:
        answer = signed.client.delete("/jobs/x", headers={"authorization": f"Bearer {signed.secret}", **headers})
        problem_of(answer, 404, "not_found")


def test_another_sites_page_signs_nobody_in_or_out(signed: Signed) -> None:
    for headers in FROM_ELSEWHERE:
        answer = signed.client.post("/session", json={"key": signed.secret}, headers=headers)
        assert "set-cookie" not in answer.headers
        problem_of(answer, 403, "forbidden")
        problem_of(signed.client.delete("/session", headers=headers), 403, "forbidden")
    assert signed.client.get("/jobs").status_code == 200


def test_looking_with_the_cookie_is_left_to_the_browsers_own_rules(signed: Signed) -> None:
    assert signed.client.get("/jobs", headers={"sec-fetch-site": "cross-site"}).status_code == 200


def test_without_keys_another_sites_page_may_do_nothing_on_loopback(start: Start) -> None:
    client = start()
    for headers in FROM_ELSEWHERE:
        problem_of(client.delete("/jobs/x", headers=headers), 401, "unauthorized")
        problem_of(client.get("/session", headers=headers), 401, "unauthorized")


def test_without_keys_a_strangers_domain_that_resolves_to_loopback_is_not_let_in(start: Start) -> None:
    client = start()
    for host in ("localhost:8000", "127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "[::1]", "10.0.0.1", "gpu-box",
                 "app.localhost:80", "LOCALHOST"):  # fmt: skip
        assert client.get("/jobs", headers={"host": host}).status_code == 200, host
    for host in ("evil.example:8000", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000"):
        problem_of(client.get("/jobs", headers={"host": host}), 401, "unauthorized")
