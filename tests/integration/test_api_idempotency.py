"""`Idempotency-Key`: sent twice, at once, after an error or after a death, a request creates once."""

import errno
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from service import main
from service.api import datasets as datasets_module
from service.db import catalog
from service.db import idempotency as kept
from service.db.models import Dataset, IdempotentAnswer, Job
from service.main import _round
from service.storage import Storage
from tests.integration.conftest import api, listening, make_app
from tests.integration.test_api_datasets import GOOD, table
from tests.problems import problem_of
from tests.rows import START, StillClock, add_dataset

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
DAY = 24 * 3600


class Service:
    """An API whose time is moved by hand, and what it holds."""

    def __init__(self, client: TestClient, clock: StillClock) -> None:
        self.client, self.clock = client, clock
        self.context = client.app.state.context  # type: ignore[attr-defined]

    def upload(self, content: bytes = GOOD, *, key: str = KEY, filename: str = "a.csv", **form: str) -> Any:
        headers = {"idempotency-key": key}
        return self.client.post("/datasets", files={"file": (filename, content)}, data=form, headers=headers)

    def upload_with_job(self, spec: str = "{}", content: bytes = GOOD, *, key: str = KEY, **form: str) -> Any:
        headers = {"idempotency-key": key}
        data = {"spec": spec, **form}
        return self.client.post("/jobs", files={"file": ("a.csv", content)}, data=data, headers=headers)

    def start_job(self, raw: str, *, key: str = KEY) -> Any:
        headers = {"idempotency-key": key, "content-type": "application/json"}
        return self.client.post("/jobs", content=raw, headers=headers)

    def count(self, table: Any) -> int:
        with self.context.db.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    def stored_files(self) -> int:
        """After what is no longer needed was collected."""
        main._round(self.context)
        return sum(path.is_file() for path in (self.context.settings.data_dir / "storage").rglob("*"))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    clock = StillClock()
    with api(tmp_path / "data", clock=clock) as client:
        yield Service(client, clock)


def assert_replayed(again: Any, first: Any) -> None:
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers.get("location") == first.headers.get("location")


# The same again -----------------------------------------------------------------------------------
def test_an_upload_sent_again_is_answered_as_before_and_kept_once(service: Service) -> None:
    first = service.upload(name="tickets", label_column="label")
    assert first.status_code == 201
    assert_replayed(service.upload(name="tickets", label_column="label"), first)
    assert_replayed(service.upload(label_column="label", name="tickets", delimiter="", filename="b.csv"), first)
    assert (service.count(Dataset), service.stored_files()) == (1, 1)
    without = service.client.get(f"/datasets/{first.json()['id']}")
    assert without.json() == first.json()


def test_a_job_sent_again_is_answered_as_before_and_started_once(service: Service) -> None:
    dataset_id = add_dataset(service.context.db)
    first = service.start_job(f'{{"dataset_id": "{dataset_id}", "seed": 7, "margin": 0.5}}')
    assert (first.status_code, first.headers["location"]) == (202, f"/jobs/{first.json()['id']}")
    service.client.post(f"/jobs/{first.json()['id']}/cancel")
    again = service.start_job(f'{{"margin":5e-1,\n"seed":7,"dataset_id":"{dataset_id}"}}')
    assert_replayed(again, first)
    assert again.json()["status"] == "queued"  # as it was answered, not as it is
    assert service.count(Job) == 1


def test_one_call_from_csv_to_job_makes_both_once(service: Service) -> None:
    first = service.upload_with_job('{"seed": 7}', name="t")
    assert first.status_code == 202
    assert_replayed(service.upload_with_job('{"seed": 7}', name="t"), first)
    assert (service.count(Dataset), service.count(Job), service.stored_files()) == (1, 1, 1)


def test_without_the_header_each_request_creates(service: Service) -> None:
    for _ in range(2):
        answer = service.client.post("/datasets", files={"file": ("a.csv", GOOD)})
        assert "idempotency-replayed" not in answer.headers
    assert (service.count(Dataset), service.count(IdempotentAnswer)) == (2, 0)


def test_another_request_with_the_same_key_is_refused_and_creates_nothing(service: Service) -> None:
    dataset_id = add_dataset(service.context.db)
    assert service.upload(name="tickets").status_code == 201
    others = [
        service.upload(GOOD + b"one more,fee\n", name="tickets"),
        service.upload(name="Tickets"),
        service.upload(),
        service.upload_with_job(name="tickets"),
        service.start_job(f'{{"dataset_id": "{dataset_id}"}}'),
        service.client.post("/keys", json={"name": "x", "scope": "admin"}, headers={"idempotency-key": KEY}),
    ]
    for answer in others:
        assert "new key" in problem_of(answer, 422, "idempotency_key_reused")["detail"]
    assert (service.count(Dataset), service.count(Job)) == (2, 0)
    job = f'{{"dataset_id": "{dataset_id}", "seed": %s}}'
    assert service.start_job(job % 1, key="k").status_code == 202
    problem_of(service.start_job(job % 2, key="k"), 422, "idempotency_key_reused")
    assert service.upload_with_job(key="m").status_code == 202
    problem_of(service.upload_with_job('{"seed": 1}', key="m"), 422, "idempotency_key_reused")


def test_callers_never_see_each_others_answers(service: Service) -> None:
    answers = [service.upload()]
    with service.context.db.write() as session:
        secrets = [catalog.create_key(session, name, "write", START)[1] for name in ("one", "two")]
    for secret in secrets:
        service.client.headers["authorization"] = f"Bearer {secret}"
        answers.append(service.upload())
    assert len({answer.json()["id"] for answer in answers}) == 3
    assert_replayed(service.upload(), answers[2])
    # Signed in with the key is the same caller.
    service.client.post("/session", json={"key": secrets[0]})
    del service.client.headers["authorization"]
    assert_replayed(service.upload(), answers[1])


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "tab\there", "é", "\x7f"], ids=repr)
def test_a_malformed_key_is_refused(service: Service, key: str) -> None:
    headers = {"idempotency-key": key.encode("latin-1")}
    answer = service.client.post("/datasets", files={"file": ("a.csv", GOOD)}, headers=headers)  # type: ignore[arg-type]
    [entry] = problem_of(answer, 422, "invalid_input")["errors"]
    assert "idempotency-key" in str(entry["loc"]).lower()
    assert service.count(Dataset) == 0


@pytest.mark.parametrize("key", ["x", "x" * 255, '"quoted, as the draft has it"', "~!@#"], ids=lambda key: key[:5])
def test_any_printable_key_is_good(service: Service, key: str) -> None:
    first = service.upload(key=key)
    assert_replayed(service.upload(key=key), first)


def test_after_a_day_the_key_is_forgotten_also_by_housekeeping(service: Service) -> None:
    first = service.upload()
    service.clock.advance(DAY - 1)
    _round(service.context)
    assert_replayed(service.upload(), first)
    service.clock.advance(1)
    second = service.upload(name="another request")
    assert second.status_code == 201
    assert service.count(Dataset) == 2
    service.clock.advance(DAY)
    _round(service.context)
    assert service.count(IdempotentAnswer) == 0


# Errors are not kept ------------------------------------------------------------------------------
def test_a_refused_request_may_be_corrected_under_the_same_key(service: Service) -> None:
    for _ in range(2):
        problem_of(service.upload(table({"refund": 5, "fee": 1})), 422, "rare_labels")
    assert service.upload(GOOD).status_code == 201
    problem_of(service.start_job('{"dataset_id": "ds_0"}', key="k"), 404, "not_found")
    dataset_id = add_dataset(service.context.db)
    assert service.start_job(f'{{"dataset_id": "{dataset_id}"}}', key="k").status_code == 202


def test_what_broke_on_our_side_is_tried_again_and_leaves_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    service.client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
    for module, name in ((Storage, "put"), (datasets_module, "keep")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            problem_of(service.upload(), 500, "internal")
        assert (service.count(Dataset), service.stored_files(), service.count(IdempotentAnswer)) == (0, 0, 0)
    assert service.upload().status_code == 201


def test_a_job_that_is_refused_leaves_no_dataset_behind(service: Service) -> None:
    spec = json.dumps({"baseline": {"label_descriptions": {"nobody": "x"}}})
    problem_of(service.upload_with_job(spec), 422, "invalid_input")
    assert (service.count(Dataset), service.count(Job), service.stored_files()) == (0, 0, 0)


# At once ------------------------------------------------------------------------------------------
def test_twenty_at_once_create_one_and_are_all_answered_the_same(tmp_path: Path) -> None:
    app = make_app(tmp_path / "data")
    dataset_id = add_dataset(app.state.context.db)
    ready = threading.Barrier(20)

    def send(number: int) -> list[httpx.Response]:
        headers = {"idempotency-key": KEY}
        with httpx.Client(base_url=url, timeout=60) as client:
            ready.wait(30)
            files = {"file": (f"{number}.csv", GOOD)}
            return [
                client.post("/datasets", files=files, data={"name": "t"}, headers=headers),
                client.post("/jobs", json={"dataset_id": dataset_id}, headers={"idempotency-key": "job"}),
                client.post("/jobs", files=files, data={"name": "t"}, headers={"idempotency-key": "both"}),
            ]

    with listening(app) as url, ThreadPoolExecutor(20) as pool:
        sent = list(pool.map(send, range(20)))
    for answers in zip(*sent, strict=True):
        assert {answer.status_code for answer in answers} <= {201, 202}
        assert len({answer.content for answer in answers}) == 1
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 19
    service = Service(TestClient(app), StillClock())
    # Of the uploads, the calls with a file for a job, and the one that was there.
    assert (service.count(Dataset), service.count(Job), service.stored_files()) == (3, 2, 2)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The first upload reaches the storage (the first event) and waits there for the second event."""
    reached, go_on, put, calls = threading.Event(), threading.Event(), Storage.put, itertools.count()

    def waits(*given: Any) -> Any:
        if next(calls) == 0:
            reached.set()
            assert go_on.wait(30)
        return put(*given)

    monkeypatch.setattr(Storage, "put", waits)
    yield reached, go_on
    go_on.set()


def test_the_second_waits_while_the_first_is_being_answered(
    service: Service, slow: tuple[threading.Event, threading.Event]
) -> None:
    reached, go_on = slow
    with ThreadPoolExecutor() as pool:
        first = pool.submit(service.upload)
        assert reached.wait(30)
        second = pool.submit(service.upload)
        problem_of(service.upload(name="another"), 422, "idempotency_key_reused")
        assert service.upload(key="of its own").status_code == 201
        assert not second.done()
        go_on.set()
        assert_replayed(second.result(30), first.result(30))
    assert service.count(Dataset) == 2


def test_one_that_was_overtaken_creates_nothing_and_gives_the_others_answer(
    service: Service, slow: tuple[threading.Event, threading.Event]
) -> None:
    reached, go_on = slow
    with ThreadPoolExecutor() as pool:
        first = pool.submit(service.upload)
        assert reached.wait(30)
        service.clock.advance(kept.HELD.total_seconds())
        second = service.upload()
        assert second.status_code == 201
        go_on.set()
        assert_replayed(first.result(30), second)
    assert (service.count(Dataset), service.stored_files()) == (1, 1)


def test_nobody_waits_for_ever_for_one_that_does_not_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.idempotency._LONGEST_WAIT_SECONDS", 0.3)
    taken(service)
    problem_of(service.upload(), 503, "still_answering")


def taken(service: Service) -> None:
    """The key as a process leaves it that dies while it answers."""
    service.upload()
    with service.context.db.write() as session:
        row = session.scalars(select(IdempotentAnswer)).one()
        row.status = row.body = None
        session.delete(session.scalars(select(Dataset)).one())


def test_a_key_is_free_again_when_whoever_took_it_has_been_silent(service: Service) -> None:
    taken(service)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(service.upload)
        service.clock.advance(kept.HELD.total_seconds() - 1)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        service.clock.advance(1)
        assert waiting.result(30).status_code == 201
    assert service.count(Dataset) == 1


@pytest.mark.parametrize("killed_in", ["service.storage.Storage.put", "service.api.datasets.keep"])
def test_a_process_killed_while_it_answers_leaves_nothing_half_made(tmp_path: Path, killed_in: str) -> None:
    program = """if True:
        import os, sys
        from pathlib import Path
        from unittest import mock
        from tests.integration.test_api_idempotency import Service, StillClock, api
        with api(Path(sys.argv[1]), fresh=False) as client, mock.patch(sys.argv[2], lambda *_: os._exit(9)):
            Service(client, StillClock()).upload()
    """
    clock = StillClock()
    app = make_app(tmp_path / "data", clock=clock)
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path / "data"), killed_in], timeout=120, check=False)
    assert died.returncode == 9
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        service = Service(client, clock)
        assert (service.count(Dataset), service.count(IdempotentAnswer)) == (0, 1)
        clock.advance(kept.HELD.total_seconds())
        first = service.upload()
        assert first.status_code == 201
        assert_replayed(service.upload(), first)
        assert service.count(Dataset) == 1


def test_a_stopping_server_keeps_nobody_waiting(service: Service) -> None:
    taken(service)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(service.upload)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        service.context.stopping.set()
        problem_of(waiting.result(10), 503, "still_answering")


def test_the_document_names_the_header_where_it_counts(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    named = {
        path
        for path, methods in paths.items()
        for route in methods.values()
        if any(parameter["name"] == "Idempotency-Key" for parameter in route.get("parameters", []))
    }
    assert named == {"/datasets", "/jobs", "/keys"}
