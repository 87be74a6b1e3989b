"""Webhooks from the end of a job to a real receiver, which misbehaves; the time is handed in."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from standardwebhooks import Webhook, WebhookVerificationError

from service import webhooks as room
from service.core.clock import Clock, utc_now
from service.core.settings import Settings
from service.db import jobs, outbox
from service.db.engine import Database
from service.db.jobs import Lease
from service.db.models import Delivery, Event
from service.webhooks import MAX_ATTEMPTS, Webhooks, new_client, retry_after
from tests.databases import fresh_database
from tests.hook_server import HookServer, hook_server
from tests.integration.conftest import api
from tests.problems import problem_of
from tests.rows import GRACE, LEASE_SECONDS, START, StillClock, add_dataset, add_job, claim
from tests.waiting import until

SECRET = "whsec_" + "c2VjcmV0" * 5
ERROR = {"code": "invalid_data", "message": "text-canary", "hint": None}
SUMMARY = {"headline": "Fine-tuning is worth it", "recommendation": {"method": "lora", "reason": "…", "margin": 0.02},
           "methods": {}}  # fmt: skip


class Post:
    """A database whose jobs call `server`, and any number of processes that make the calls."""

    def __init__(self, folder: Path, server: HookServer) -> None:
        self.db, self.server, self.clock = fresh_database(folder), server, StillClock()
        self.settings = Settings(webhook_hosts=server.origin, webhook_secret=SECRET)

    def add_job(self, url: str | None = None) -> str:
        job_id = add_job(self.db)
        with self.db.write() as session:
            jobs.get(session, job_id).webhook_url = url or self.server.url
        return job_id

    def cancelled(self) -> str:
        """A job that has ended."""
        job_id = self.add_job()
        with self.db.write() as session:
            jobs.cancel(session, job_id, self.clock())
        return job_id

    def round(self, clock: Clock | None = None, settings: Settings | None = None, rounds: int = 1) -> None:
        async def go() -> None:
            async with new_client() as client:
                for _ in range(rounds):
                    await Webhooks(self.db, settings or self.settings, clock or self.clock, lambda: 1.0).round(client)

        asyncio.run(go())

    def told(self, job_id: str) -> list[tuple[str, str]]:
        """What the job's events say of its webhook."""
        with self.db.read() as session:
            rows = session.scalars(select(Event).where(Event.job_id == job_id, Event.type == "message"))
            return [(event.level, event.message) for event in rows]

    def waiting(self) -> list[Delivery]:
        with self.db.read() as session:
            return list(session.scalars(select(Delivery)))


@pytest.fixture
def server() -> Iterator[HookServer]:
    with hook_server() as started:
        yield started


@pytest.fixture
def post(tmp_path: Path, server: HookServer) -> Iterator[Post]:
    made = Post(tmp_path, server)
    yield made
    made.db.close()


# What is told -------------------------------------------------------------------------------------
def late(db: Database, _lease: Lease) -> None:
    jobs.reap(db, START + timedelta(seconds=LEASE_SECONDS + 1), 1, GRACE)


def cancelling(then: Callable[[Database, Lease], object]) -> Callable[[Database, Lease], object]:
    def end(db: Database, lease: Lease) -> None:
        with db.write() as session:
            jobs.cancel(session, lease.job_id, START)
        then(db, lease)

    return end


ENDS: dict[str, tuple[Callable[[Database, Lease], object], str]] = {
    "published": (lambda db, lease: jobs.publish(db, lease, [], [], SUMMARY, START, GRACE), "succeeded"),
    "failed": (lambda db, lease: jobs.fail(db, lease, ERROR, START, GRACE), "failed"),
    "lost": (lambda db, lease: jobs.lose(db, lease, "text-canary", 1, START, GRACE), "failed"),
    "reaped": (late, "failed"),
    "cancelled": (cancelling(lambda db, lease: jobs.confirm_cancelled(db, lease, START, GRACE)), "cancelled"),
    "given back": (cancelling(lambda db, lease: jobs.give_back(db, lease, START, GRACE)), "cancelled"),
    "lost in a cancel": (cancelling(lambda db, lease: jobs.lose(db, lease, "gone", 3, START, GRACE)), "cancelled"),
    "reaped in a cancel": (cancelling(late), "cancelled"),
}


@pytest.mark.parametrize("way", ENDS)
def test_every_end_of_a_job_is_told_once(post: Post, way: str) -> None:
    end, status = ENDS[way]
    job_id = post.add_job()
    end(post.db, claim(post.db).lease)
    post.clock.advance(120)
    post.round()
    post.round()
    [call] = post.server.calls
    body = json.loads(call.body)
    assert (body["type"], body["data"]["job_id"], body["data"]["status"]) == (f"job.{status}", job_id, status)
    assert (body["data"]["headline"], body["data"]["recommended_method"]) == (
        (SUMMARY["headline"], "lora") if way == "published" else (None, None)
    )
    assert body["data"]["error_code"] == {"failed": ("invalid_data" if way == "failed" else "worker_lost")}.get(status)
    assert "text-canary" not in call.body
    assert post.told(job_id)[-1] == ("info", "webhook delivered to 127.0.0.1 at attempt 1")
    assert post.waiting() == []


def test_a_job_that_goes_on_or_asks_for_nothing_tells_nothing(post: Post) -> None:
    post.add_job()
    jobs.lose(post.db, claim(post.db).lease, "gone", 3, START, GRACE)
    jobs.give_back(post.db, claim(post.db).lease, START, GRACE)
    add_job(post.db)
    for _ in range(2):
        lease = claim(post.db).lease
    jobs.fail(post.db, lease, ERROR, START, GRACE)
    assert post.waiting() == []


def test_each_end_of_a_retried_job_is_news_of_its_own(post: Post) -> None:
    job_id = post.cancelled()
    with post.db.write() as session:
        jobs.retry(session, job_id, START)
        jobs.cancel(session, job_id, START)
    post.round()
    assert len({call.headers["webhook-id"] for call in post.server.calls}) == 2


def test_an_end_that_is_rolled_back_is_not_told(post: Post) -> None:
    job_id = post.add_job()
    with contextlib.suppress(ZeroDivisionError), post.db.write() as session:
        jobs.cancel(session, job_id, START)
        raise ZeroDivisionError
    assert post.waiting() == []


# Signature ----------------------------------------------------------------------------------------
def test_the_signature_is_what_standard_webhooks_verifies(post: Post) -> None:
    post.cancelled()
    post.round(clock=utc_now)
    [call] = post.server.calls
    assert Webhook(SECRET).verify(call.body, call.headers)["type"] == "job.cancelled"
    assert call.headers["content-type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(call.body.replace("cancelled", "succeeded"), call.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "b3RoZXIx" * 5).verify(call.body, call.headers)


# Receivers that misbehave -------------------------------------------------------------------------
def test_a_call_is_tried_again_further_and_further_apart_then_given_up(post: Post) -> None:
    post.server.answer = lambda _n: 503
    job_id = post.cancelled()
    waits = []
    while post.waiting():
        before = len(post.server.calls)
        post.round()
        assert len(post.server.calls) == before + 1
        if post.waiting():
            due = post.waiting()[0].due_at
            waits.append((due - post.clock()).total_seconds())
            post.clock.advance(waits[-1] - 1)
            post.round()
            assert len(post.server.calls) == before + 1, "not before it is due"
            post.clock.advance(1)
    assert waits == [10.0 * 3**n for n in range(MAX_ATTEMPTS - 1)]
    assert 24 < sum(waits) / 3600 < 30
    assert len(post.server.calls) == MAX_ATTEMPTS
    assert len({(call.headers["webhook-id"], call.body) for call in post.server.calls}) == 1
    assert len({call.headers["webhook-timestamp"] for call in post.server.calls}) == MAX_ATTEMPTS
    told = post.told(job_id)
    assert told[0] == ("warning", "webhook to 127.0.0.1, attempt 1: answered 503; again in 10 s")
    assert told[-1] == ("error", "webhook to 127.0.0.1 given up after attempt 10: answered 503")
    assert len(told) == MAX_ATTEMPTS


def test_waits_are_spread_by_chance() -> None:
    assert retry_after(1, 0.8) == timedelta(seconds=8)
    assert retry_after(MAX_ATTEMPTS, 1.0) is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [(302, "answered 302"), (404, "answered 404"), (500, "answered 500"), (-1, "no answer (RemoteProtocolError)"),
     (None, "no answer (TimeoutError)")],
)  # fmt: skip
def test_what_is_no_success_is_tried_again_and_no_redirect_is_followed(
    post: Post, monkeypatch: pytest.MonkeyPatch, answer: int | None, words: str
) -> None:
    monkeypatch.setattr(room, "_CALL_SECONDS", 0.5)
    post.server.answer = lambda n: answer if n == 0 else 200
    post.server.headers = {"location": f"{post.server.origin}/elsewhere"}
    job_id = post.cancelled()
    post.round()
    assert post.told(job_id) == [("warning", f"webhook to 127.0.0.1, attempt 1: {words}; again in 10 s")]
    post.clock.advance(10)
    post.round()
    assert [call.path for call in post.server.calls] == ["/hook?token=hook-token-canary"] * 2
    assert post.told(job_id)[-1] == ("info", "webhook delivered to 127.0.0.1 at attempt 2")


def test_a_receivers_cookie_goes_to_nobody(post: Post) -> None:
    def answer(n: int) -> int:
        post.cancelled()
        return 204

    post.server.headers = {"set-cookie": "who=somebody; Path=/"}
    post.server.answer = answer
    post.cancelled()
    post.round(rounds=2)
    assert ["cookie" in call.headers for call in post.server.calls] == [False, False]


def test_a_receiver_that_is_gone_for_good_is_not_called_again(post: Post) -> None:
    post.server.answer = lambda _n: 410
    job_id = post.cancelled()
    post.round()
    assert post.waiting() == []
    assert post.told(job_id) == [("error", "webhook to 127.0.0.1 given up after attempt 1: answered 410")]


def test_an_answer_without_end_is_not_read(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CALL_SECONDS", 5.0)
    post.server.drips = True
    post.server.answer = lambda _n: 200
    job_id = post.cancelled()
    post.round()
    assert post.told(job_id)[-1][0] == "info"


def test_one_that_hangs_does_not_keep_the_others_waiting(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CALL_SECONDS", 1.0)
    post.server.answer = lambda n: None if n < 3 else 200
    for _ in range(6):
        post.cancelled()
    post.round()
    assert len(post.server.calls) == 6
    assert len(post.waiting()) == 3


def test_one_that_cannot_be_called_or_written_down_does_not_keep_the_others_from_being_told(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_ids = [post.cancelled() for _ in range(3)]
    calls = {delivery.job_id: delivery.id for delivery in post.waiting()}
    stream, settle = httpx.AsyncClient.stream, outbox.settle

    def strange(client: httpx.AsyncClient, *given: Any, **named: Any) -> Any:
        if named["headers"]["webhook-id"] == calls[job_ids[0]]:
            raise UnicodeError("a name that cannot be decoded")
        return stream(client, *given, **named)

    def away(session: Any, delivery: Delivery, due_at: Any) -> bool:
        if delivery.job_id == job_ids[1]:
            raise OSError("the database is away")
        return settle(session, delivery, due_at)

    monkeypatch.setattr(httpx.AsyncClient, "stream", strange)
    monkeypatch.setattr(outbox, "settle", away)
    post.round()
    assert "no answer (UnicodeError)" in post.told(job_ids[0])[-1][1]
    assert post.told(job_ids[1]) == []
    assert post.told(job_ids[2])[-1][0] == "info"


def test_a_host_that_was_taken_off_the_list_is_not_called(post: Post) -> None:
    job_id = post.cancelled()
    post.round(settings=Settings())
    assert post.server.calls == []
    assert post.told(job_id)[-1][0] == "error"
    assert "TUNEPROOF_WEBHOOK_HOSTS" in post.told(job_id)[-1][1]


# Crashes and company ------------------------------------------------------------------------------
def test_one_that_dies_before_or_in_the_call_leaves_it_to_the_next_under_the_same_id(post: Post) -> None:
    post.cancelled()
    [taken] = outbox.take_due(post.db, post.clock())  # and there the process ended
    post.round()
    assert post.server.calls == []
    post.clock.advance(outbox.LEASE.total_seconds())
    post.round()
    [call] = post.server.calls
    assert (call.headers["webhook-id"], call.body) == (taken.id, taken.body)
    assert post.waiting() == []


def test_one_whose_lease_ran_out_has_no_say_in_it_any_more(post: Post) -> None:
    job_id = post.cancelled()
    [slow] = outbox.take_due(post.db, post.clock())
    [_next] = outbox.take_due(post.db, post.clock.advance(61))
    with post.db.write() as session:
        assert outbox.settle(session, slow, None) is False
    assert len(post.waiting()) == 1
    assert post.told(job_id) == []


def test_processes_that_look_at_once_never_take_the_same_call(post: Post) -> None:
    made = {post.cancelled() for _ in range(30)}
    taken: list[str] = []
    start = threading.Barrier(4)

    def take() -> None:
        start.wait()
        while due := outbox.take_due(post.db, START):
            taken.extend(delivery.job_id for delivery in due)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(made)


def test_a_job_that_is_deleted_takes_its_call_with_it(post: Post) -> None:
    job_id = post.cancelled()
    with post.db.write() as session:
        jobs.remove(session, job_id, START, GRACE)
    post.round()
    assert (post.server.calls, post.waiting()) == ([], [])


# From the API -------------------------------------------------------------------------------------
def test_from_the_post_to_the_receiver_with_nothing_of_the_address_shown_but_its_host(
    tmp_path: Path, server: HookServer
) -> None:
    with api(tmp_path / "data", webhook_hosts=server.origin, webhook_secret=SECRET) as client:
        made = client.post("/jobs", json=_spec(client, server.url)).json()
        assert made["webhook_host"] == "127.0.0.1"
        client.post(f"/jobs/{made['id']}/cancel")
        until(lambda: server.calls, 20, "the webhook is called")
        shown = "/jobs", f"/jobs/{made['id']}", f"/jobs/{made['id']}/events", "/metrics"
        for path in shown:
            assert "hook-token-canary" not in client.get(path).text, path
        ended = client.get(f"/jobs/{made['id']}").json()
    data = json.loads(server.calls[0].body)["data"]
    same = ("name", "kind", "status", "attempt", "dataset_id", "model_id", "created_at", "started_at", "finished_at")
    assert {key: data[key] for key in same} == {key: ended[key] for key in same}


def test_a_webhook_that_is_not_allowed_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    with api(tmp_path / "data") as client:
        spec: dict[str, Any] = _spec(client, "https://hooks.example.com/canary")
        told = problem_of(client.post("/jobs", json=spec), 422, "invalid_input")
        assert "TUNEPROOF_WEBHOOK_HOSTS" in told["detail"]
        assert "canary" not in json.dumps(told)
        for odd in ("", "x" * 2001, 1):
            problem_of(client.post("/jobs", json=spec | {"webhook_url": odd}), 422, "invalid_input")
        assert client.get("/jobs").json()["data"] == []


def _spec(client: TestClient, url: str) -> dict[str, Any]:
    dataset_id = add_dataset(client.app.state.context.db)  # type: ignore[attr-defined]
    return {"dataset_id": dataset_id, "webhook_url": url}
