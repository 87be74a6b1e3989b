"""The client against a fake server: what it sends, what it makes of the answers, and when it asks again."""

import asyncio
import io
import itertools
import json
import pickle
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

from tests.fake_server import (
    DATASET,
    EMPTY,
    FAILED,
    JOB,
    MODEL,
    RUNNING,
    FakeServer,
    answer,
    event,
    lost,
    problem,
    unreachable,
)
from tools import make_sync
from tuneproof import Client, Job, JobFailed, TuneproofError, WaitTimeout
from tuneproof.results import parse
from tuneproof.retries import Attempts
from tuneproof.tables import csv_of


def sse(*events: dict[str, Any], breaks: bool = False) -> Any:
    """A handler that sends these events, and at the end breaks the connection or ends in order."""

    def answer(request: httpx.Request) -> httpx.Response:
        def chunks() -> Any:
            yield b": keep-alive\n\n"
            for one in events:
                number = f"id: {one['id']}\n" if "id" in one else ""
                yield f"{number}data: {json.dumps(one)}\n\n".encode()
            if breaks:
                raise httpx.RemoteProtocolError("peer closed connection", request=request)

        return httpx.Response(200, content=chunks(), headers={"Content-Type": "text/event-stream; charset=utf-8"})

    return answer


# What is sent -------------------------------------------------------------------------------------
def test_one_call_uploads_the_file_with_the_spec_and_the_fields_that_were_given(
    server: FakeServer, tickets: Path
) -> None:
    server.answers["POST /jobs"] = JOB
    client = server.client(api_key=" secret\n")
    job = client.jobs.submit(tickets, {"seed": 7}, has_header=False, encoding=None, text_column=0)
    request = server.requests[0]
    body = request.content.decode()
    assert job.id == "job_1"
    assert request.headers["Authorization"] == "Bearer secret"
    assert 'name="file"; filename="tickets.csv"' in body
    assert "where is my money,refund" in body
    assert 'name="spec"\r\n\r\n{"seed": 7}\r\n' in body
    assert 'name="has_header"\r\n\r\nfalse\r\n' in body
    assert 'name="text_column"\r\n\r\n0\r\n' in body
    assert "encoding" not in body


@pytest.mark.parametrize("by", ["id", "dataset"])
def test_a_job_on_a_dataset_that_is_there_sends_json_alone(server: FakeServer, by: str) -> None:
    server.answers |= {"POST /jobs": JOB, "GET /datasets/ds_1": DATASET}
    client = server.client()
    client.jobs.submit("ds_1" if by == "id" else client.datasets.get("ds_1"), {"seed": 7}, name="again")
    assert json.loads(server.requests[-1].content) == {"seed": 7, "name": "again", "dataset_id": "ds_1"}
    with pytest.raises(ValueError, match="text_column describe a file"):
        client.jobs.submit("ds_1", text_column="x")


def test_a_frame_goes_as_csv_that_another_reader_gives_back_whole(server: FakeServer) -> None:
    server.answers["POST /datasets"] = DATASET
    texts = ['said "no", twice', "two\nlines", "tab\there", "a\rb", "é; ü", None]
    frame = pd.DataFrame({0: texts, "label, or so": list("aabbcc")}, index=range(10, 16))
    server.client().datasets.upload(frame, text_column=0)
    body = server.requests[0].content
    sent = body.split(b'filename="dataframe.csv"\r\nContent-Type: text/csv\r\n\r\n')[1].split(b"\r\n--")[0]
    read = pd.read_csv(io.BytesIO(sent), dtype=str, keep_default_na=False, lineterminator="\n")
    assert list(read.columns) == ["0", "label, or so"]
    assert list(read["0"]) == [*texts[:-1], ""]
    for name, value in {"text_column": "0", "delimiter": ",", "has_header": "true", "encoding": "utf-8"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in body


@pytest.mark.parametrize(
    ("labels", "sent"),
    [
        ([1, 2, None], [b"1", b"2", b'""']),
        ([1.0, 2.5, None], [b"1.0", b"2.5", b'""']),
        (pd.Series([1.0, 2.0, None], dtype=object), [b"1", b"2", b'""']),
        (pd.Series([1.0, 2.0, pd.NA], dtype=object), [b"1", b"2", b'""']),
        (pd.Series([1.0, "2.0", None], dtype=object), [b"1.0", b'"2.0"', b'""']),
        (pd.Series([1.0, 2.0, None], dtype="category"), [b"1", b"2", b'""']),
        (pd.Series([1.0, 2.0, None], dtype="float16"), [b"1", b"2", b'""']),
        (pd.Series([1.0, 2.0, None], dtype="Float64"), [b"1", b"2", b'""']),
        ([1.0, 1e30, None], [b"1.0", b"1e+30", b'""']),
        ([1.0, float("inf"), None], [b"1.0", b"inf", b'""']),
        ([1.0, 2.0, 3.0], [b"1.0", b"2.0", b"3.0"]),
        ([True, False, True], [b"True", b"False", b"True"]),
        (pd.Categorical(["x", "y", None]), [b'"x"', b'"y"', b'""']),
    ],
)
@pytest.mark.filterwarnings("error")
def test_whole_numbers_stay_whole_where_one_is_missing_and_all_else_stays_as_it_is(
    labels: Any, sent: list[bytes]
) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": labels}).set_index(pd.Index([0, 0, 0]))
    assert [line.split(b",")[1] for line in csv_of(frame).splitlines()[1:]] == sent


def test_what_is_no_table_or_no_utf_8_is_refused_in_words(server: FakeServer) -> None:
    with pytest.raises(ValueError, match="found a Series"):
        server.client().datasets.upload(pd.Series(["a"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="surrogate"):
        server.client().datasets.upload(pd.DataFrame({"text": ["\ud800"], "label": ["a"]}))


def test_predict_sends_a_target_precision_in_place_of_a_threshold(server: FakeServer) -> None:
    server.answers["POST /predict"] = answer(["a"])
    server.client().predict("mdl_1", "a", target_precision=0.9)
    server.client().predict("mdl_1", ["a"], target_precision=0.9, min_confidence=0.5)
    sent = {"model": "mdl_1", "texts": ["a"], "top_k": 3, "target_precision": 0.9}
    assert [json.loads(request.content) for request in server.requests] == [sent, sent | {"min_confidence": 0.5}]


def test_an_id_cannot_lead_to_another_path(server: FakeServer) -> None:
    server.answers["POST /jobs/../models/x/cancel"] = JOB  # httpx decodes; what is sent stays quoted
    server.client().jobs.cancel("../models/x")
    assert server.requests[0].url.raw_path == b"/jobs/..%2Fmodels%2Fx/cancel"


def test_an_alias_is_moved_by_force_only_where_that_is_said(server: FakeServer) -> None:
    gate = {"checked": True, "verdict": "inconclusive", "n": 9, "accuracy_delta": 0.1, "note": "Few rows."}
    alias = {"alias": "prod", "model_id": "mdl_1", "updated_at": JOB["created_at"], "gate": gate}
    server.answers |= {"PUT /aliases/prod": alias, "GET /aliases/prod/gate": gate, "DELETE /aliases/prod": {}}
    client = server.client()
    moved = client.aliases.put("prod", "mdl_1")
    client.aliases.put("prod", "mdl_1", force=True)
    assert [json.loads(r.content) for r in server.requests] == [
        {"model_id": "mdl_1"},
        {"model_id": "mdl_1", "force": True},
    ]
    assert moved.gate
    assert (moved.gate.verdict, moved.gate.note) == ("inconclusive", "Few rows.")
    asked = client.aliases.gate("prod", "mdl_2")
    assert asked == moved.gate
    assert server.requests[-1].url.params["model_id"] == "mdl_2"
    client.aliases.delete("prod")


# What comes back ----------------------------------------------------------------------------------
def test_answers_are_typed_to_the_leaves_and_keep_what_nobody_knows(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = JOB | {"mood": "good"}
    job = server.client().jobs.get("job_1")
    assert job.summary
    assert job.summary.methods["lora"].accuracy == 0.89
    assert job.summary.recommendation
    assert job.summary.recommendation.reason == "Nothing beats it; set `seed` to 1."
    assert (job.created_at.year, job.created_at.utcoffset()) == (2026, pd.Timedelta(0))
    assert job.artifacts[0].name == "metrics.json"
    assert job.served == ("mdl_probe", "embedding_logreg")
    assert job.raw["mood"] == "good"
    with pytest.raises(AttributeError):
        job.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("summary", "served"),
    [
        (None, None),
        ({"headline": "none is served"}, None),
        (JOB["summary"] | {"recommendation": {"method": "tfidf_logreg", "reason": "", "margin": 0.02}}, "mdl_probe"),
    ],
)
def test_the_model_to_call_is_the_recommended_or_else_the_most_accurate_served_one(summary: Any, served: Any) -> None:
    found = parse(Job, JOB | {"summary": summary}).served
    assert (found and found[0]) == served


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"id": "job_1"}, "Job without kind"),
        ([], "expected a JSON object for Job, found list"),
        (JOB | {"progress": 3}, "expected a JSON object for Progress, found int"),
        (JOB | {"created_at": "yesterday"}, "yesterday"),
        (JOB | {"artifacts": 3}, "not iterable"),
        ("<html>", "expected a JSON object"),
    ],
)
def test_an_answer_of_another_kind_is_one_clear_error(server: FakeServer, found: Any, words: str) -> None:
    server.answers["GET /jobs/job_1"] = found
    with pytest.raises(TuneproofError, match=words) as caught:
        server.client().jobs.get("job_1")
    assert caught.value.code == "unexpected_answer"


@pytest.mark.parametrize("page", [{}, [], {"data": 3, "has_more": False}, {"data": [3], "has_more": False}])
def test_a_list_of_another_kind_is_one_clear_error(server: FakeServer, page: Any) -> None:
    server.answers["GET /jobs"] = page
    with pytest.raises(TuneproofError, match="not a tuneproof server"):
        list(server.client().jobs.list())


def test_a_problem_becomes_an_error_with_its_status_code_and_detail(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = problem(
        422, "rare_labels", errors=[{"row": 3, "message": "alone"}], hint="Drop it."
    )
    with pytest.raises(TuneproofError, match="Expected this, found that") as caught:
        server.client().jobs.get("job_1")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.status, error.code, error.hint) == (422, "rare_labels", "Drop it.")
    assert error.errors == [{"row": 3, "message": "alone"}]


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (httpx.Response(502, text="<html>Bad Gateway</html>"), 502, "502 Bad Gateway"),
        (httpx.Response(500, json=["odd"]), 500, "500"),
        (httpx.Response(302, headers={"Location": "/login"}), 302, "302"),
        (httpx.Response(200, text="<html>Hello</html>"), None, "not a tuneproof server"),
        (unreachable, None, "No server answers"),
        (
            httpx.Response(503, json={"status": "not_ready", "checks": {"engine": "is starting", "storage": "ok"}}),
            503,
            "The server is not ready: engine: is starting.",
        ),
    ],
)
def test_what_is_no_problem_document_still_becomes_one_clear_error(
    server: FakeServer, found: Any, status: int | None, words: str
) -> None:
    server.answers["GET /readyz"] = found
    with pytest.raises(TuneproofError, match=words) as caught:
        server.client().ready()
    assert caught.value.status == status
    assert len(server.requests) == 1, "whether it is ready is asked once, unless told to wait"


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "127.0.0.1:8000", "ftp://127.0.0.1"])
def test_a_name_that_is_no_url_is_an_error_of_ours(url: str) -> None:
    with pytest.raises(TuneproofError, match="not a URL"):
        Client(url).ready()


def test_a_key_that_no_header_can_hold_is_an_error_of_ours() -> None:
    with pytest.raises(TuneproofError, match="ASCII"):
        Client(api_key="ключ")


def test_lists_are_followed_to_their_end_and_no_further_than_asked(server: FakeServer) -> None:
    def pages(request: httpx.Request) -> dict[str, Any]:
        if request.url.params.get("after") == "mdl_2":
            return {"data": [MODEL | {"id": "mdl_1"}], "has_more": False}
        return {"data": [MODEL | {"id": "mdl_3"}, MODEL | {"id": "mdl_2"}], "has_more": True}

    server.answers |= {"GET /models": pages, "GET /jobs": EMPTY}
    client = server.client()
    assert [model.id for model in client.models.list()] == ["mdl_3", "mdl_2", "mdl_1"]
    server.requests.clear()
    assert [model.id for model in client.models.list(limit=2)] == ["mdl_3", "mdl_2"]
    assert [request.url.params["limit"] for request in server.requests] == ["2"]
    assert list(client.jobs.list(status="failed", kind=None)) == []
    assert dict(server.requests[-1].url.params) == {"status": "failed", "limit": "200"}


def test_flips_are_asked_for_by_side_and_label(server: FakeServer) -> None:
    flip = {
        "id": 1, "candidate": "lora", "baseline": "majority", "row_id": 7, "text": "t", "label": "a",
        "candidate_answer": "a", "baseline_answer": None, "flip": "fixed",
    }  # fmt: skip
    server.answers["GET /jobs/job_1/flips"] = {"data": [flip], "has_more": False}
    (found,) = server.client().jobs.flips("job_1", candidate="lora", label="a")
    assert (found.flip, found.baseline_answer) == ("fixed", None)
    assert dict(server.requests[-1].url.params) == {"candidate": "lora", "label": "a", "limit": "200"}


def test_a_dataset_can_be_looked_at(server: FakeServer, tickets: Path) -> None:
    split = {"algorithm": "v1", "seed": 7, "n_train": 1, "n_validation": 1, "n_test": 1}
    found = {
        "dataset_id": "ds_1", "split": split, "warnings": [], "near_duplicates": {"count": 0}, "truncation": None,
        "eta": {"lora": {"seconds": None, "basis": None}},
    }  # fmt: skip
    server.answers |= {
        "POST /datasets": DATASET,
        "GET /datasets/ds_1/preflight": found,
        "GET /datasets/ds_1/rows": {"data": [{"row_id": 0, "text": "t", "label": None}], "has_more": True},
        "GET /datasets": {"data": [DATASET], "has_more": False},
        "DELETE /datasets/ds_1": httpx.Response(204),
    }
    client = server.client()
    dataset = client.datasets.upload(tickets, label_column="label")
    assert dataset.warnings[0].rows == (2,)
    assert dataset.labels[0].label == "refund"
    assert 'name="spec"' not in server.requests[0].content.decode()
    assert client.datasets.preflight(dataset.id, base_model="minilm", seed=7).eta["lora"].seconds is None
    assert dict(server.requests[-1].url.params) == {"base_model": "minilm", "seed": "7"}
    assert [row.text for row in client.datasets.rows(dataset.id, offset=3)] == ["t"]
    assert [dataset.id for dataset in client.datasets.list()] == ["ds_1"]
    client.datasets.delete(dataset.id)


# Asking again -------------------------------------------------------------------------------------
def test_it_asks_again_when_the_server_says_so_and_not_before(server: FakeServer, waits: list[float]) -> None:
    server.answers["POST /predict"] = iter(
        [problem(503, "base_loading", "2"), problem(429, "queue_full", "1"), answer(["a"])]
    )
    assert server.client().predict("mdl_1", ["a"]).model_id == "mdl_1"
    assert [2 <= waits[0] <= 2.2, 1 <= waits[1] <= 1.1, len(waits)] == [True, True, 2]
    sent = {"model": "mdl_1", "texts": ["a"], "top_k": 3, "min_confidence": 0.0}
    assert [json.loads(request.content) for request in server.requests] == [sent] * 3


def test_a_date_is_as_good_as_a_number_of_seconds(server: FakeServer, waits: list[float]) -> None:
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.answers["GET /jobs/job_1"] = iter([problem(503, "queue_full", past), JOB])
    assert server.client().jobs.get("job_1").id == "job_1"
    assert waits == [0]


@pytest.mark.parametrize(
    "trouble",
    [lost, unreachable, httpx.Response(502), httpx.Response(504), httpx.Response(503, text="no upstream")],
)
def test_a_lost_answer_creates_nothing_twice(
    server: FakeServer, tickets: Path, waits: list[float], trouble: Any
) -> None:
    server.answers |= {"GET /readyz": {"status": "ready"}, "POST /jobs": iter([trouble, trouble, JOB])}
    client = server.client()
    client.ready()
    client.jobs.submit(tickets)
    asked = server.requests[1:]
    assert len(asked) == 3
    assert len({request.headers["Idempotency-Key"] for request in asked}) == 1
    assert all(b"where is my money,refund" in request.content for request in asked), "the file is rewound"
    assert waits[0] < waits[1] < 0.5, "each pause is longer"


def test_every_call_has_a_key_of_its_own_unless_the_caller_has_one(server: FakeServer, tickets: Path) -> None:
    server.answers["POST /jobs"] = JOB
    client = server.client()
    for _ in range(2):
        client.jobs.submit(tickets)
    client.jobs.submit("ds_1", idempotency_key="mine")
    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert len(set(keys)) == 3
    assert keys[-1] == "mine"


@pytest.mark.parametrize(
    ("found", "retry_seconds"),
    [
        (problem(503, "base_loading", "30"), 20.0),  # would pass the deadline
        (problem(503, "base_not_served", "1"), 20.0),  # will not get better
        (problem(503, "down"), 20.0),  # does not say when
        (problem(429, "queue_full"), 20.0),
        (problem(404, "not_found"), 20.0),
        (problem(401, "unauthorized"), 20.0),
        (problem(422, "invalid_input"), 20.0),
        (problem(507, "low_disk"), 20.0),
        (problem(500, "internal"), 20.0),
        (lost, 0.0),
    ],
)
def test_it_gives_up_where_asking_again_is_of_no_use(
    server: FakeServer, found: Any, retry_seconds: float, waits: list[float]
) -> None:
    server.answers["POST /predict"] = found
    with pytest.raises(TuneproofError):
        server.client(retry_seconds=retry_seconds).predict("mdl_1", ["a"])
    assert len(server.requests) == 1
    assert waits == []


def test_what_was_deleted_by_a_call_whose_answer_was_lost_is_deleted(server: FakeServer, waits: list[float]) -> None:
    server.answers["DELETE /jobs/job_1"] = iter([lost, problem(404, "not_found"), problem(404, "not_found")])
    server.client().jobs.delete("job_1")
    with pytest.raises(TuneproofError):
        server.client().jobs.delete("job_1")


@pytest.mark.parametrize("what", ["cancel", "retry"])
def test_what_was_heard_though_its_answer_was_lost_is_not_refused(
    server: FakeServer, waits: list[float], what: str
) -> None:
    refused = problem(409, "conflict")
    server.answers |= {f"POST /jobs/job_1/{what}": iter([lost, refused, refused]), "GET /jobs/job_1": RUNNING}
    jobs = server.client().jobs
    assert getattr(jobs, what)("job_1").status == "running"
    with pytest.raises(TuneproofError):
        getattr(jobs, what)("job_1")


REFUSED = httpx.ConnectError("refused")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def full(request: httpx.Request) -> httpx.Response:
    raise httpx.PoolTimeout("full", request=request)


@pytest.mark.parametrize("first", [problem(503, "queue_full", "0"), unreachable, full])
def test_what_surely_was_not_heard_before_is_refused_when_it_is_refused(
    server: FakeServer, waits: list[float], first: Any
) -> None:
    server.answers["DELETE /jobs/job_1"] = iter([first, problem(404, "not_found")])
    with pytest.raises(TuneproofError, match="found that"):
        server.client().jobs.delete("job_1")


@pytest.mark.parametrize(
    ("met", "errors", "least", "most"),
    [
        (True, [REFUSED], 52, 60),
        (False, [REFUSED], 0.5, 1.5),
        (False, [httpx.ReadError("reset")], 52, 60),  # something is there, and may have heard what was sent
        (False, [httpx.ReadError("reset"), REFUSED], 52, 60),  # it was there, and starts anew
        (False, [httpx.ProxyError("502")], 0.5, 1.5),  # the proxy is there, and nothing behind it
    ],
)
def test_the_time_for_another_attempt_runs_from_the_first_failure(
    met: bool, errors: list[httpx.RequestError], least: float, most: float
) -> None:
    clock = Clock()
    each = itertools.chain(errors, itertools.repeat(errors[-1]))
    attempts = Attempts("http://x", 60, met=met, clock=clock)
    clock.now = 1000.0  # a long upload that failed at its end is still tried again
    waited: list[float] = []

    def try_on() -> None:
        while True:
            waited.append(attempts.pause(next(each)))
            clock.now += waited[-1]

    with pytest.raises(TuneproofError, match="http://x"):
        try_on()
    assert least < sum(waited) <= most
    assert max(waited) <= 8


def test_a_certificate_that_is_not_trusted_is_said_at_once() -> None:
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed")
    with pytest.raises(TuneproofError, match=r"No secure connection to https://x: .*SSL_CERT_FILE"):
        Attempts("https://x", 60, met=True).pause(error)


# Waiting ------------------------------------------------------------------------------------------
def test_watching_ends_with_the_terminal_state(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = RUNNING | {"status": "queued", "stage": None}
    server.answers["GET /jobs/job_1/wait"] = iter([RUNNING, JOB])
    assert [job.status for job in server.client().jobs.watch("job_1")] == ["queued", "running", "succeeded"]
    assert server.requests[-1].url.params["timeout_seconds"] == "1.0"


def test_waiting_gives_the_job_and_calls_back_with_each_state(server: FakeServer, waits: list[float]) -> None:
    server.answers |= {"GET /jobs/job_1": RUNNING, "GET /jobs/job_1/wait": iter([RUNNING, lost, JOB])}
    seen: list[float] = []
    job = server.client().jobs.wait("job_1", lambda job: seen.append(job.progress.fraction))
    assert (job.status, seen) == ("succeeded", [0.42, 0.42, 1.0])


def test_a_job_that_failed_is_an_error_unless_told_otherwise(server: FakeServer) -> None:
    server.answers["GET /jobs/job_1"] = FAILED
    client = server.client()
    with pytest.raises(JobFailed, match="It did not fit") as caught:
        client.jobs.wait("job_1")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.code, error.hint, error.job.id) == ("out_of_memory", "Try a smaller batch.", "job_1")
    assert client.jobs.wait("job_1", raise_on_failure=False).status == "failed"
    server.answers["GET /jobs/job_1"] = FAILED | {"status": "cancelled", "error": None}
    with pytest.raises(JobFailed, match="job_1 was cancelled") as caught:
        client.jobs.wait("job_1")
    assert caught.value.code == "cancelled"


def test_waiting_no_longer_than_asked_is_a_timeout_error(server: FakeServer) -> None:
    server.answers |= {"GET /jobs/job_1": RUNNING, "GET /jobs/job_1/wait": RUNNING}
    with pytest.raises(WaitTimeout, match=r"running after 0\.01 s; it goes on") as caught:
        server.client().jobs.wait("job_1", timeout_seconds=0.01)
    assert isinstance(caught.value, TimeoutError)
    assert all(float(request.url.params["timeout_seconds"]) <= 0.01 for request in server.requests[1:])


@pytest.mark.parametrize("seen", ["GET /jobs/job_1", "GET /jobs/job_1/wait"])
@pytest.mark.parametrize("last", [problem(503, "queue_full", "30"), unreachable])
def test_where_the_server_is_away_at_the_end_of_the_wait_it_is_a_timeout_error_too(
    server: FakeServer, waits: list[float], seen: str, last: Any
) -> None:
    server.answers |= {"GET /jobs/job_1": RUNNING, seen: last}
    with pytest.raises(WaitTimeout, match=r"job_1 .* 5 s, as far as can be seen\. (Expected this|No server)"):
        server.client().jobs.wait("job_1", timeout_seconds=5)
    with pytest.raises(TuneproofError) as caught:
        server.client(retry_seconds=0.0).jobs.wait("job_1")
    assert not isinstance(caught.value, TimeoutError), "nobody said how long to wait"
    server.answers[seen] = problem(401, "unauthorized")
    with pytest.raises(TuneproofError) as caught:
        server.client().jobs.wait("job_1", timeout_seconds=5)
    assert caught.value.status == 401


def test_a_server_that_asks_for_a_longer_pause_than_is_left_is_asked_once_more_at_the_end(
    server: FakeServer, waits: list[float]
) -> None:
    busy = problem(503, "queue_full", "60")
    server.answers["GET /jobs/job_1"] = iter([busy, JOB])
    assert server.client().jobs.wait("job_1", timeout_seconds=30).status == "succeeded"
    server.answers["GET /jobs/job_1"] = iter([busy, busy])
    with pytest.raises(WaitTimeout, match="has not ended after 30 s"):
        server.client().jobs.wait("job_1", timeout_seconds=30)
    assert waits == [pytest.approx(30, abs=1)] * 2, "what is said to have passed has passed"


# The stream ---------------------------------------------------------------------------------------
PROGRESS = {
    "type": "progress",
    "data": {"stage": "train", "fraction": 0.4, "eta_seconds": 9.0, "status": "running", "attempt": 1},
}


def test_a_stream_goes_on_after_a_break_where_it_was(server: FakeServer, waits: list[float]) -> None:
    server.answers["GET /jobs/job_1/events"] = iter(
        [
            sse(event(1), PROGRESS, event(2), breaks=True),
            unreachable,
            problem(503, "engine_unavailable", "1"),
            sse(event(3, type="metric", data={"validation_macro_f1": 0.9}), event(4)),
            httpx.Response(204),
        ]
    )
    events = list(server.client().jobs.stream("job_1"))
    assert [found.id for found in events] == [1, None, 2, 3, 4]
    assert events[1].data["fraction"] == 0.4
    assert events[3].data == {"validation_macro_f1": 0.9}
    assert [request.headers.get("Last-Event-ID") for request in server.requests] == [None, "2", "2", "2", "4"]
    assert all(request.headers["Accept"] == "text/event-stream" for request in server.requests)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (problem(404, "not_found"), "Expected this"),
        (EMPTY, "no stream of events"),
        (sse({"id": 1}), "Event without type"),
    ],
)
def test_what_is_no_stream_is_one_clear_error(server: FakeServer, found: Any, words: str) -> None:
    server.answers["GET /jobs/job_1/events"] = found
    with pytest.raises(TuneproofError, match=words):
        list(server.client().jobs.stream("job_1"))


# Files --------------------------------------------------------------------------------------------
def half(request: httpx.Request) -> httpx.Response:
    def chunks() -> Any:
        yield b"half"
        raise httpx.ReadError("gone", request=request)

    return httpx.Response(200, content=chunks())


def test_a_download_that_breaks_is_begun_anew_and_leaves_no_half_file(
    server: FakeServer, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "GET /jobs/job_1/artifacts/adapter/a.json"
    server.answers[path] = iter([half, httpx.Response(200, content=b"whole")])
    assert server.client().jobs.download("job_1", "adapter/a.json", tmp_path / "a.json").read_bytes() == b"whole"

    for trouble, words in ((half, "gone"), (problem(404, "not_found"), "Expected this")):
        server.answers[path] = trouble
        with pytest.raises(TuneproofError, match=words):
            server.client(retry_seconds=0).jobs.download("job_1", "adapter/a.json", tmp_path / "b.json")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]

    monkeypatch.chdir(tmp_path)
    server.answers |= {
        path: httpx.Response(200, content=b"1"),
        "GET /jobs/job_1/report": httpx.Response(200, content=b"2"),
        "GET /models/mdl_1/download": httpx.Response(200, content=b"3"),
    }
    client = server.client()
    client.jobs.download("job_1", "adapter/a.json")
    client.jobs.report("job_1")
    client.models.download("mdl_1")
    contents = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert contents == {"a.json": b"1", "report-job_1.html": b"2", "mdl_1.zip": b"3"}


# Frames -------------------------------------------------------------------------------------------
def upper(request: httpx.Request) -> dict[str, Any]:
    return answer(json.loads(request.content)["texts"])


def test_a_frame_is_labelled_in_batches_by_one_version_and_stays_in_line(server: FakeServer) -> None:
    server.answers["POST /predict"] = upper
    frame = pd.DataFrame({"t": ["a", None, "b", "", "c"], "n": range(5)}, index=[9, 7, 5, 3, 1])
    client = server.client()
    found = client.predict_frame("prod", frame, "t", batch_size=2)
    assert list(found.index) == list(frame.index)
    assert found["label"].tolist() == ["A", None, "B", None, "C"]
    assert found["confidence"].tolist() == pytest.approx([0.987, float("nan"), 0.987, float("nan"), 0.987], nan_ok=True)
    sent = [json.loads(request.content) for request in server.requests]
    assert [(one["model"], one["texts"]) for one in sent] == [("prod", ["a", "b"]), ("mdl_1", ["c"])]

    assert client.predict_frame("prod", frame["t"]).equals(found)
    assert client.predict_frame("prod", frame.iloc[:0], "t").shape == (0, 2)
    with pytest.raises(ValueError, match=r"\(t, n\), found 'text'"):
        client.predict_frame("prod", frame, "text")


def test_labels_left_open_are_missing(server: FakeServer) -> None:
    server.answers["POST /predict"] = lambda request: answer(["x"], label=None, abstained=True)
    found = server.client().predict_frame("prod", pd.Series(["x"]), min_confidence=0.99)
    assert found["label"].isna().tolist() == [True]
    assert found["confidence"].tolist() == [0.987]


def test_predictions_come_as_a_frame_in_which_a_label_may_be_called_na(server: FakeServer) -> None:
    text = (
        "row_id,split,in_baseline_subset,text,label,lora,lora_confidence,prompt,prompt_raw\n"
        '3,test,1,"a, b",NA,null,0.5,,\n4,validation,0,x,nan,NA,1,,\n'
    )
    server.answers["GET /jobs/job_1/artifacts/predictions.csv"] = httpx.Response(200, text=text)
    frame = server.client().jobs.predictions("job_1")
    assert frame["label"].tolist() == ["NA", "nan"]
    assert frame["lora"].tolist() == ["null", "NA"]
    assert frame["prompt"].isna().all()
    assert frame["prompt_raw"].tolist() == ["", ""]
    assert frame["row_id"].tolist() == [3, 4]
    assert frame["in_baseline_subset"].tolist() == [True, False]
    assert frame["lora_confidence"].tolist() == [0.5, 1.0]


def test_a_file_is_labelled_by_a_job_whose_predictions_come_as_a_frame_on_every_row(
    server: FakeServer, tickets: Path
) -> None:
    server.answers["POST /jobs"] = JOB | {"kind": "predict", "model_id": "mdl_1"}
    assert server.client().jobs.predict("prod", tickets, top_k=1, name="n").kind == "predict"
    assert (
        '{"kind": "predict", "model": "prod", "min_confidence": 0.0, "top_k": 1}' in server.requests[0].content.decode()
    )
    text = "row_id,text,label,confidence,label_1,probability_1\n0,a,NA,0.5,NA,0.5\n1,,,,,\n2,b,,0.25,x,0.25\n"
    server.answers["GET /jobs/job_1/artifacts/predictions.csv"] = httpx.Response(200, text=text)
    frame = server.client().jobs.predictions("job_1")
    assert frame["label"].isna().tolist() == [False, True, True]
    assert frame["text"].tolist() == ["a", "", "b"]
    assert frame["confidence"].dropna().tolist() == frame["probability_1"].dropna().tolist() == [0.5, 0.25]
    assert frame["label_1"].dropna().tolist() == ["NA", "x"]
    server.answers["GET /jobs/job_1/artifacts/predictions.csv"] = httpx.Response(200, text=text.splitlines()[0])
    assert server.client().jobs.predictions("job_1")["confidence"].dtype == "float64"


# Both of them -------------------------------------------------------------------------------------
def test_the_client_without_await_is_made_from_the_one_with() -> None:
    found = {path.name: path.read_text("utf-8") for path in make_sync.MADE.glob("*.py")}
    assert found == make_sync.made(), "run tools/make_sync.py"


def test_with_await_it_does_the_same(server: FakeServer, tickets: Path, tmp_path: Path) -> None:
    stream, sent = "GET /jobs/job_1/events", f"id: 1\ndata: {json.dumps(event(1))}\n\n".encode()
    server.answers |= {
        "POST /jobs": iter([lost, JOB]), "GET /readyz": {"status": "ready"}, "GET /jobs/job_1": RUNNING,
        "GET /jobs/job_1/wait": JOB, "GET /models": {"data": [MODEL], "has_more": False}, "POST /predict": upper,
        stream: iter([httpx.Response(200, content=sent, headers={"Content-Type": "text/event-stream"}), lost,
                      httpx.Response(204)]),
        "GET /jobs/job_1/report": httpx.Response(200, content=b"page"),
    }  # fmt: skip

    async def go_through() -> None:
        async with server.async_client() as client:
            assert (await client.ready()).status == "ready"
            job = await client.jobs.submit(tickets)
            assert (await client.jobs.wait(job.id)).status == "succeeded"
            assert [found.id async for found in client.jobs.stream(job.id)] == [1]
            assert [model.id async for model in client.models.list()] == ["mdl_1"]
            assert (await client.predict("mdl_1", "a")).predictions[0].label == "A"
            assert (await client.predict_frame("mdl_1", pd.Series(["a"])))["label"].tolist() == ["A"]
            assert (await client.jobs.report(job.id, tmp_path / "r.html")).read_bytes() == b"page"

    asyncio.run(go_through())
    first, second = (request for request in server.requests if request.url.path == "/jobs")
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert all(b"where is my money,refund" in request.content for request in (first, second))


def test_neither_client_nor_command_imports_what_is_heavy() -> None:
    program = (
        "import sys, tuneproof, tuneproof.cli, tuneproof.demo; "
        "print(*{'service', 'worker', 'fastapi', 'torch', 'pandas', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == ""
