"""`/jobs`, `/models` and `/aliases`: what a spec may say, what a job shows, and what it leaves."""

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, select

from service.core.errors import AppError
from service.core.spec import JobSpec
from service.db import jobs
from service.db.jobs import Progress
from service.db.models import Artifact, Job
from tests.problems import problem_of
from tests.rows import ARTIFACTS, GRACE, START, add_dataset, add_job, add_published, claim, model, publish_stored

Start = Callable[..., TestClient]
TABLE = b"text,label\n" + b"".join(b"text number %d,%s\n" % (i, b"ab"[i % 2 : i % 2 + 1]) for i in range(12))


@pytest.fixture
def client(shared: TestClient) -> Iterator[TestClient]:
    """After every test, whatever it sent, a job can still be started."""
    yield shared
    assert post(shared).status_code == 202


def context(client: TestClient) -> Any:
    return client.app.state.context  # type: ignore[attr-defined]


def post(client: TestClient, **spec: Any) -> Any:
    dataset_id = add_dataset(context(client).db)
    return client.post("/jobs", json={"dataset_id": dataset_id} | spec)


def post_raw(client: TestClient, raw: str | bytes, **headers: str) -> Any:
    return client.post("/jobs", content=raw, headers={"content-type": "application/json"} | headers)


# Starting -----------------------------------------------------------------------------------------
def test_a_job_is_accepted_with_every_default_in_its_spec(client: TestClient) -> None:
    answer = post(client, metadata={"ticket": "ABC-1"})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert client.get(answer.headers["location"]).json() == job
    assert (job["kind"], job["name"], job["status"], job["terminal"], job["stage"]) == (
        "experiment", "tickets", "queued", False, None
    )  # fmt: skip
    assert job["progress"] == {"fraction": 0.0, "message": "", "eta_seconds": None}
    assert (job["attempt"], job["started_at"], job["finished_at"], job["error"], job["summary"]) == (
        0,
        None,
        None,
        None,
        None,
    )
    assert (job["artifacts"], job["model_id"], job["metadata"]) == ([], None, {"ticket": "ABC-1"})
    assert job["spec"] == {
        "kind": "experiment", "name": "tickets", "base_model": "auto", "seed": 42,
        "split": {"train": 0.8, "validation": 0.1, "test": 0.1},
        "baseline": {"methods": ["majority", "tfidf_logreg", "embedding_logreg", "zero_shot"], "sample_size": 300,
                     "prompt_model": "auto", "prompt_template": None, "few_shot": 0, "decoding": "free",
                     "label_descriptions": {}},
        "train": {"epochs": "auto", "batch_size": "auto", "learning_rate": "auto", "max_length": 192, "lora_rank": 16,
                  "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "attention", "precision": "auto",
                  "gradient_checkpointing": "auto", "class_weights": "none", "early_stopping_patience": 2},
        "learning_curve": [], "margin": 0.02,
    }  # fmt: skip


def test_one_multipart_call_makes_dataset_and_job(client: TestClient) -> None:
    form = {"spec": json.dumps({"kind": "baseline", "seed": 7}), "name": "mine", "label_column": "label"}
    answer = client.post("/jobs", files={"file": ("t.csv", TABLE)}, data=form)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["kind"], job["name"], job["spec"]["seed"]) == ("baseline", "mine", 7)
    assert client.get(f"/datasets/{job['dataset_id']}").json()["name"] == "mine"
    assert client.post("/jobs", files={"file": ("t.csv", TABLE)}).json()["kind"] == "experiment"


@pytest.mark.parametrize(
    ("content", "form"),
    [(b"text,label\n", {}), (TABLE + b"ragged\n", {}), (b"\x1f\x8b\x08\x00", {}), (TABLE, {"label_column": "x"})],
    ids=["no rows", "ragged", "gzip", "no such column"],
)
def test_what_refuses_the_dataset_refuses_the_job_with_the_same_answer(
    client: TestClient, content: bytes, form: dict[str, str]
) -> None:
    answers = [client.post(path, files={"file": content}, data=form) for path in ("/datasets", "/jobs")]
    bodies = [answer.json() | {"request_id": ""} for answer in answers]
    assert bodies[0] == bodies[1]
    problem_of(answers[1], answers[0].status_code, bodies[0]["code"])


BAD_FORMS: dict[str, dict[str, str]] = {
    "a spec that is no JSON": {"spec": "{"},
    "a spec out of range": {"spec": '{"seed": -1}'},
    "a spec with a dataset": {"spec": '{"dataset_id": "ds_0"}'},
    "an unknown field": {"seed": "1"},
    "no labels": {"labelled": "false"},
    "a lone surrogate": {"spec": '{"name": "\\ud800"}'},
    "a deep spec": {"spec": '{"a":' * 100_000},
}


@pytest.mark.parametrize("what", BAD_FORMS)
def test_a_job_that_is_refused_leaves_no_dataset(client: TestClient, what: str) -> None:
    before = client.get("/datasets").json()
    answer = client.post("/jobs", files={"file": ("t.csv", TABLE)}, data=BAD_FORMS[what])
    problem_of(answer, 422, answer.json()["code"])
    assert client.get("/datasets").json() == before


def test_a_job_on_a_dataset_without_labels_or_on_none_is_refused(client: TestClient) -> None:
    unlabelled = add_dataset(context(client).db, labels=())
    problem_of(client.post("/jobs", json={"dataset_id": unlabelled}), 422, "invalid_data")
    problem_of(client.post("/jobs", json={"dataset_id": "ds_0"}), 404, "not_found")
    assert problem_of(client.post("/jobs", json={}), 422, "invalid_input")["errors"][0]["loc"] == ["dataset_id"]


# The ranges, field by field: as the contract's table has them.
RANGES: list[tuple[str, list[Any], list[Any], str]] = [
    ("name", ["x", "x" * 200], ["", "x" * 201, 1, []], "1 to 200 characters"),
    ("seed", [0, 2**32 - 1], [-1, 2**32, 2**63, 1.5, "1", True, None], "0 to 4294967295"),
    ("baseline.sample_size", [10, 10_000], [9, 10_001, 2**63], "10 to 10000"),
    ("baseline.few_shot", [0, 64], [-1, 65], "0 to 64"),
    ("baseline.decoding", ["free", "constrained"], ["beam", None], "'free', 'constrained'"),
    (
        "baseline.label_descriptions",
        [{}],
        [{str(i): "x" for i in range(1001)}],
        "1000",
    ),
    ("baseline.label_descriptions.a", ["x", "x" * 500], ["", " ", "x" * 501, 1, None], "1 to 500 characters"),
    ("train.epochs", [1, 100, "auto"], [0, 101, "many", 1.5], "1 to 100, or 'auto'"),
    ("train.batch_size", [1, 1024, "auto"], [0, 1025], "1 to 1024, or 'auto'"),
    ("train.learning_rate", [1e-7, 0.1, "auto"], [9e-8, 0.11, 0, -1], "1e-07 to 0.1, or 'auto'"),
    ("train.max_length", [8, 512], [7, 513, 2**63], "8"),
    ("train.lora_rank", [1, 256], [0, 257], "1 to 256"),
    ("train.lora_alpha", [1, 512], [0, 513], "1 to 512"),
    ("train.lora_dropout", [0, 0.5], [-0.01, 0.51], "0 to 0.5"),
    ("train.precision", ["auto", "bf16", "fp32"], ["fp16", "", 16], "'auto', 'bf16', 'fp32'"),
    ("train.gradient_checkpointing", ["auto", True, False], ["on", 1, None], "true, or false, or 'auto'"),
    ("train.class_weights", ["none", "balanced"], ["other", None], "'none', 'balanced'"),
    ("train.early_stopping_patience", [0, 50], [-1, 51], "0 to 50"),
    ("train.target_modules", ["attention"], ["all-linear", ["q_proj"]], "'attention'"),
    ("learning_curve", [[], [1], [0.1, 0.25, 0.5, 1.0]], [[0.5, 0.1], [0.5, 0.5]], "ascend"),
    ("learning_curve", [[i / 10 for i in range(1, 11)]], [[i / 100 for i in range(1, 12)]], "10"),
    ("learning_curve.0", [], [0, -0.1, 1.01, "half", None], "0.001 to 1"),
    ("margin", [0, 0.5], [-0.001, 0.501, "0.1"], "0 to 0.5"),
    ("kind", ["experiment", "train", "baseline"], ["fine-tune", 1], "'experiment', 'train', 'baseline'"),
    ("metadata", [{}, {"k" * 64: "v" * 512}, {str(i): "" for i in range(16)}], [{str(i): "" for i in range(17)}], "16"),
    ("metadata.k", ["v" * 512], ["v" * 513, 1, None, {}], "512 characters"),
    (f"metadata.{'k' * 65}", [], ["v"], "64 characters"),
]


def nested(field: str, value: Any) -> dict[str, Any]:
    for part in reversed(field.split(".")):
        value = {part: value}
    return dict(value)


def test_a_description_of_a_label_that_the_dataset_lacks_is_422_naming_it(client: TestClient) -> None:
    problem = post(client, **nested("baseline.label_descriptions", {"a": "x", "nosuch": "y"}))
    assert problem.status_code == 422
    assert [error["loc"][-1] for error in problem.json()["errors"]] == ["nosuch"]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, good, _, _ in RANGES for value in good], ids=lambda x: str(x)[:40]
)
def test_every_end_of_a_range_is_allowed(client: TestClient, field: str, value: Any) -> None:
    assert post(client, **nested(field, value)).status_code == 202


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [(field, value, allowed) for field, _, bad, allowed in RANGES for value in bad],
    ids=lambda x: str(x)[:40],
)
def test_past_a_range_is_422_naming_the_field_and_what_is_allowed(
    client: TestClient, field: str, value: Any, allowed: str
) -> None:
    given = {"learning_curve": [value]} if field == "learning_curve.0" else nested(field, value)
    body = problem_of(post(client, **given), 422, "invalid_input")
    [entry] = body["errors"]
    assert [str(part) for part in entry["loc"]] == field.split(".")
    assert allowed in entry["message"]
    assert field in body["detail"]


@pytest.mark.parametrize(
    "split",
    [{"train": 0.9, "validation": 0.05, "test": 0.05}, {"train": 0.8000001, "validation": 0.1, "test": 0.1},
     {"train": 0.05, "validation": 0.05, "test": 0.9}],
)  # fmt: skip
def test_shares_that_sum_to_one_are_allowed(client: TestClient, split: dict[str, float]) -> None:
    assert post(client, split=split).status_code == 202


@pytest.mark.parametrize(
    ("split", "loc"),
    [({"train": 0.5}, ["split"]), ({"train": 0.80001}, ["split"]),
     ({"train": 0.91, "validation": 0.05, "test": 0.05}, ["split", "train"]),
     ({"train": 0.86, "validation": 0.04, "test": 0.1}, ["split", "validation"]), ({"dev": 0.1}, ["split", "dev"])],
)  # fmt: skip
def test_shares_that_do_not_are_422(client: TestClient, split: dict[str, float], loc: list[str]) -> None:
    assert problem_of(post(client, split=split), 422, "invalid_input")["errors"][0]["loc"] == loc


@pytest.mark.parametrize("field", ["epochs", "train.rank", "baseline.model", "split.val", "train.lora_rank.x", "id"])
def test_an_unknown_field_is_422_and_named(client: TestClient, field: str) -> None:
    body = problem_of(post(client, **nested(field, 1)), 422, "invalid_input")
    assert ".".join(map(str, body["errors"][0]["loc"])) in (field, field.removesuffix(".x"))


@pytest.mark.parametrize(
    ("methods", "fine"),
    [
        (["majority"], True),
        ([], False),
        (["majority", "majority"], False),
        (["lora"], False),
        ("majority", False),
        ([1], False),
    ],
)
def test_methods_are_known_and_each_is_named_once(client: TestClient, methods: Any, fine: bool) -> None:
    answer = post(client, baseline={"methods": methods})
    assert answer.status_code == 202 if fine else problem_of(answer, 422, "invalid_input")


def test_a_template_without_its_places_is_422(client: TestClient) -> None:
    body = problem_of(post(client, baseline={"prompt_template": "Classify {text}"}), 422, "invalid_input")
    assert "{labels}" in body["errors"][0]["message"]


def test_a_remote_model_is_one_that_the_operator_configured(start: Start) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    client = start(prompt_endpoints={"ollama": endpoint, "vllm": endpoint})
    taken = post(client, baseline={"prompt_model": "remote:ollama"})
    assert taken.status_code == 202
    assert taken.json()["spec"]["baseline"]["prompt_model"] == "remote:ollama"
    assert "127.0.0.1:9" not in taken.text
    for name in ("remote:gone", "remote:", "remote:OLLAMA"):
        body = problem_of(post(client, baseline={"prompt_model": name}), 422, "invalid_input")
        assert "'remote:ollama', 'remote:vllm'" in body["detail"]
        assert body["errors"][0]["loc"] == ["baseline", "prompt_model"]


@pytest.mark.parametrize("field", ["base_model", "baseline.prompt_model"])
@pytest.mark.parametrize("name", ["gpt-4", "../minilm", "codefuse-ai/F2LLM-0.6B", "MINILM", "file:///etc", "a\u0000b"])
def test_a_base_model_off_the_list_is_422_and_the_list_is_told(client: TestClient, field: str, name: str) -> None:
    body = problem_of(post(client, **nested(field, name)), 422, "unknown_base_model")
    assert ("minilm" if field == "base_model" else "qwen3-0.6b") in body["detail"]
    assert body["errors"][0]["loc"] == field.split(".")


def test_a_model_that_cannot_be_prompted_is_refused_as_the_prompt_model_it_was_named_as(start: Start) -> None:
    client = start(prompt_endpoints={"ollama": {"base_url": "http://127.0.0.1:9/v1", "model": "llama3.2"}})
    body = problem_of(post(client, baseline={"prompt_model": "minilm"}), 422, "unknown_base_model")
    assert body["detail"].endswith("Use 'auto' or one of: qwen3-0.6b, remote:ollama.")
    assert body["errors"][0]["loc"] == ["baseline", "prompt_model"]


# Predicting ---------------------------------------------------------------------------------------
@pytest.fixture
def predicting(start: Start) -> tuple[TestClient, str]:
    """An API without other jobs, and a model that `prod` points to."""
    client = start()
    model_id = add_published(context(client).db, context(client).storage)[1]
    assert client.put("/aliases/prod", json={"model_id": model_id}).status_code == 200
    return client, model_id


def test_a_job_that_predicts_keeps_the_one_model_that_its_alias_points_to(predicting: tuple[TestClient, str]) -> None:
    client, model_id = predicting
    job = post(client, kind="predict", model="prod", top_k=2).json()
    assert (job["kind"], job["status"], job["model_id"], job["name"]) == ("predict", "queued", model_id, "tickets")
    assert job["spec"] == {
        "kind": "predict", "name": "tickets", "model": model_id, "top_k": 2, "min_confidence": 0.0
    }  # fmt: skip
    assert [one["id"] for one in client.get("/jobs", params={"kind": "predict"}).json()["data"]] == [job["id"]]


def test_a_file_to_predict_needs_no_labels_and_may_say_that_it_has_some(predicting: tuple[TestClient, str]) -> None:
    client, model_id = predicting
    form = {"spec": json.dumps({"kind": "predict", "model": model_id})}
    answer = client.post("/jobs", files={"file": ("t.csv", b'text\nhello there\n""\n')}, data=form)
    assert answer.status_code == 202, answer.text
    dataset = client.get(f"/datasets/{answer.json()['dataset_id']}").json()
    assert (dataset["labels"], dataset["n_rows"], dataset["label_column"]) == ([], 2, None)
    asked = client.post("/jobs", files={"file": ("t.csv", b"text\nhello there\n")}, data=form | {"labelled": "true"})
    problem_of(asked, 422, asked.json()["code"])


def test_a_file_to_predict_is_read_from_the_column_that_the_model_learned_from(start: Start) -> None:
    client = start()
    rows = "".join(f"{i},the {label} {i},{label}\n" for label in ("fee", "refund") for i in range(3))
    learned = {"file": ("t.csv", f"text,message_raw,label\n{rows}".encode())}
    dataset_id = client.post("/datasets", files=learned, data={"text_column": "message_raw"}).json()["id"]
    assert client.post("/jobs", json={"dataset_id": dataset_id}).status_code == 202
    db, made = context(client).db, model()
    publish_stored(db, claim(db).lease, [], [made], {}, START, GRACE)
    form = {"spec": json.dumps({"kind": "predict", "model": made.id})}
    for header, text_column in (("text,message_raw", "message_raw"), ("text,other", "text")):
        sent = {"file": ("n.csv", f"{header}\nso it is,so it was\nhow it is,how it was\n".encode())}
        answer = client.post("/jobs", files=sent, data=form)
        assert answer.status_code == 202, answer.text
        dataset = client.get(f"/datasets/{answer.json()['dataset_id']}").json()
        assert (dataset["text_column"], "text_column" in dataset["inferred"]) == (text_column, True)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"kind": "predict", "model": "prod", "seed": 1}, "seed"),
        ({"kind": "predict", "model": "prod", "train": {}}, "train"),
        ({"kind": "predict", "model": "prod", "base_model": "minilm"}, "base_model"),
        ({"kind": "predict"}, "model"),
        ({"kind": "predict", "model": "prod", "top_k": 21}, "top_k"),
        ({"kind": "predict", "model": "prod", "min_confidence": 1.5}, "min_confidence"),
        ({"kind": "train", "model": "prod"}, "model"),
        ({"top_k": 3}, "top_k"),
        ({"min_confidence": 0.5}, "min_confidence"),
    ],
)
def test_fields_that_say_nothing_about_a_kind_of_job_are_422_and_named(
    predicting: tuple[TestClient, str], spec: dict[str, Any], field: str
) -> None:
    client, _ = predicting
    body = problem_of(post(client, **spec), 422, "invalid_input")
    assert [entry["loc"] for entry in body["errors"]] == [[field]]


def test_a_model_that_nobody_published_is_404_and_leaves_no_dataset(predicting: tuple[TestClient, str]) -> None:
    client, _ = predicting
    problem_of(post(client, kind="predict", model="mdl_0"), 404, "not_found")
    before = client.get("/datasets").json()
    form = {"spec": json.dumps({"kind": "predict", "model": "staging"})}
    problem_of(client.post("/jobs", files={"file": ("t.csv", b"text\nhello\n")}, data=form), 404, "not_found")
    assert client.get("/datasets").json() == before


def test_a_model_stays_while_a_job_is_to_predict_with_it(predicting: tuple[TestClient, str]) -> None:
    client, model_id = predicting
    job = post(client, kind="predict", model=model_id).json()
    assert client.delete("/aliases/prod").status_code == 204
    assert job["id"] in problem_of(client.delete(f"/models/{model_id}"), 409, "conflict")["detail"]
    assert client.post(f"/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    assert client.delete(f"/models/{model_id}").status_code == 204
    problem_of(client.post(f"/jobs/{job['id']}/retry"), 409, "conflict")


def test_one_key_makes_one_job_that_predicts_also_when_the_alias_has_moved(
    predicting: tuple[TestClient, str],
) -> None:
    client, model_id = predicting
    body = {"dataset_id": add_dataset(context(client).db), "kind": "predict", "model": "prod"}
    first = client.post("/jobs", json=body, headers={"Idempotency-Key": "k"})
    second = add_published(context(client).db, context(client).storage, name="other")[1]
    assert client.put("/aliases/prod", json={"model_id": second, "force": True}).status_code == 200
    again = client.post("/jobs", json=body, headers={"Idempotency-Key": "k"})
    assert again.json() == first.json()
    assert again.json()["model_id"] == model_id


def test_a_full_disk_takes_no_job_that_predicts(start: Start) -> None:
    client = start(min_free_bytes=2**62)
    model_id = add_published(context(client).db, context(client).storage)[1]
    problem_of(post(client, kind="predict", model=model_id), 507, "low_disk")


RAW: dict[str, str | bytes] = {
    "NaN": '{"dataset_id": "ds_0", "margin": NaN}',
    "Infinity": '{"dataset_id": "ds_0", "margin": Infinity}',
    "-Infinity": '{"dataset_id": "ds_0", "margin": -Infinity}',
    "1e999": '{"dataset_id": "ds_0", "margin": 1e999}',
    "a lone surrogate": '{"dataset_id": "ds_0", "name": "\\ud800"}',
    "a lone surrogate as an id": '{"dataset_id": "\\ud800"}',
    "a lone surrogate as a key": '{"\\udfff": 1}',
    "2^63": '{"dataset_id": "ds_0", "seed": 9223372036854775808}',
    "5,000 digits": '{"dataset_id": "ds_0", "seed": 1' + "0" * 5000 + "}",
    "100,000 lists deep": "[" * 100_000,
    "100,000 objects deep": '{"a":' * 100_000,
    "100,000 deep and closed": '{"metadata":' + "[" * 100_000 + "]" * 100_000 + "}",
    "cut short": '{"dataset_id": "ds_',
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "a string": '"ds_0"',
    "two bodies": '{"dataset_id": "ds_0"} {}',
    "single quotes": "{'dataset_id': 'ds_0'}",
    "bytes that are no UTF-8": b'{"name": "\xff\xfe"}',
    "UTF-16": '{"dataset_id": "ds_0"}'.encode("utf-16"),
    "NUL": b"\x00" * 100,
}


@pytest.mark.parametrize("what", RAW)
def test_a_broken_body_is_422_and_never_500(client: TestClient, what: str) -> None:
    problem_of(post_raw(client, RAW[what]), 422, "invalid_input")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "text/csv", "application/jsonp", "x"]
)
def test_another_content_type_is_422(client: TestClient, kind: str) -> None:
    body = problem_of(client.post("/jobs", content=b"{}", headers={"content-type": kind}), 422, "invalid_input")
    assert "application/json" in body["detail"]


def test_json_by_another_name_and_a_charset_is_json(client: TestClient) -> None:
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"):
        problem_of(
            client.post("/jobs", content=b'{"dataset_id": "ds_0"}', headers={"content-type": kind}), 404, "not_found"
        )


def test_a_spec_past_a_megabyte_is_413(client: TestClient) -> None:
    problem_of(post_raw(client, b'{"name": "' + b"x" * (1 << 20) + b'"}'), 413, "too_large")


def test_what_was_sent_is_not_repeated_in_a_refusal(client: TestClient) -> None:
    answer = post(client, name="private " * 100, metadata={"a": "secret " * 100})
    assert "private" not in answer.text
    assert "secret" not in answer.text


def test_a_field_that_does_not_exist_is_named_with_the_one_that_was_meant(client: TestClient) -> None:
    body = problem_of(post(client, train={"epoch": 1}), 422, "invalid_input")
    assert body["detail"].startswith(
        "The request is not valid in train.epoch: there is no such field; did you mean 'ep"
    )
    assert body["errors"] == [
        {"loc": ["train", "epoch"], "message": "there is no such field; did you mean 'epochs'?"}
    ]  # fmt: skip
    body = problem_of(post(client, split={"zzz": 1}), 422, "invalid_input")
    assert "there is no such field; there are test, train, validation." in body["detail"]


# Following ----------------------------------------------------------------------------------------
def test_a_running_job_shows_where_it_stands(start: Start) -> None:
    client = start()
    db = context(client).db
    job_id = add_job(db)
    lease = claim(db).lease
    spec = JobSpec(name="tickets", base_model="minilm").model_dump(exclude={"model", "metadata", "dataset_id"})
    jobs.report(db, lease, START, Progress("train", 0.42, "epoch 2/5", 95.0), spec=spec)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["stage"], job["attempt"], job["spec"]["base_model"]) == ("running", "train", 1, "minilm")
    assert job["progress"] == {"fraction": 0.42, "message": "epoch 2/5", "eta_seconds": 95.0}
    assert job["started_at"].startswith("2026-03-01T12:00:00")
    problem_of(client.delete(f"/jobs/{job_id}"), 409, "conflict")
    problem_of(client.post(f"/jobs/{job_id}/retry"), 409, "conflict")
    problem_of(client.delete(f"/datasets/{job['dataset_id']}"), 409, "conflict")
    cancelling = client.post(f"/jobs/{job_id}/cancel")
    assert (cancelling.status_code, cancelling.json()["status"], cancelling.json()["terminal"]) == (
        202,
        "cancelling",
        False,
    )
    jobs.confirm_cancelled(db, lease, START, GRACE)
    problem_of(client.post(f"/jobs/{job_id}/cancel"), 409, "conflict")
    retried = client.post(f"/jobs/{job_id}/retry")
    assert (retried.status_code, retried.json()["status"], retried.json()["stage"]) == (202, "queued", None)
    assert client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    problem_of(client.get(f"/jobs/{job_id}"), 404, "not_found")
    problem_of(client.get(f"/jobs/{job_id}/events"), 404, "not_found")


def test_a_failed_job_says_why_and_what_to_do(start: Start) -> None:
    client = start()
    db = context(client).db
    job_id = post(client).json()["id"]
    error = {"code": "model_unavailable", "message": "It cannot be had.", "hint": "Put its files there."}
    jobs.fail(db, claim(db).lease, error, START, GRACE)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["terminal"], job["error"]["code"], job["error"]["hint"]) == (
        "failed", True, "model_unavailable", "Put its files there."
    )  # fmt: skip


def test_events_are_oldest_first_and_go_on_after_an_id(start: Start) -> None:
    client = start()
    db = context(client).db
    job_id = add_job(db)
    lease = claim(db).lease
    jobs.report(db, lease, START, events=[("info", "message", f"note {i}", {"i": i}) for i in range(5)])
    page = client.get(f"/jobs/{job_id}/events").json()
    assert [event["message"] for event in page["data"]] == [
        "queued",
        "attempt 1 started",
        *(f"note {i}" for i in range(5)),
    ]
    assert set(page["data"][0]) == {"id", "job_id", "created_at", "level", "type", "message", "data"}
    first = client.get(f"/jobs/{job_id}/events?limit=2").json()
    assert (len(first["data"]), first["has_more"]) == (2, True)
    rest = client.get(f"/jobs/{job_id}/events?after={first['data'][-1]['id']}").json()
    assert ([event["data"] for event in rest["data"]], rest["has_more"]) == ([{"i": i} for i in range(5)], False)


@pytest.mark.parametrize("query", ["after=-1", f"after={2**63}", "after=x", "limit=0", "limit=201"])
def test_events_out_of_range_are_422(client: TestClient, query: str) -> None:
    problem_of(client.get(f"/jobs/job_0/events?{query}"), 422, "invalid_input")


@pytest.mark.parametrize(
    "query", ["status=done", "kind=x", "limit=0", "after=ds_0", "after=job_%00", f"dataset_id={'x' * 65}"]
)
def test_a_list_of_jobs_asked_for_wrongly_is_422(client: TestClient, query: str) -> None:
    problem_of(client.get(f"/jobs?{query}"), 422, "invalid_input")


def test_jobs_are_listed_by_status_kind_and_dataset(start: Start) -> None:
    client = start()
    one, two, three = (post(client, kind=kind).json() for kind in ("train", "baseline", "train"))
    client.post(f"/jobs/{three['id']}/cancel")

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"/jobs?{query}").json()["data"]]

    assert found("") == [three["id"], two["id"], one["id"]]
    assert found("kind=train") == [three["id"], one["id"]]
    assert found("kind=train&status=queued") == [one["id"]]
    assert found(f"dataset_id={two['dataset_id']}") == [two["id"]]
    assert found("dataset_id=ds_0") == []
    assert found(f"after={two['id']}") == [one["id"]]


# Waiting ------------------------------------------------------------------------------------------
def test_a_wait_ends_as_soon_as_the_status_changes(start: Start) -> None:
    client = start()
    db = context(client).db
    job_id = add_job(db)
    threading.Timer(0.3, lambda: claim(db)).start()
    answer = client.get(f"/jobs/{job_id}/wait?timeout_seconds=30")
    assert (answer.status_code, answer.json()["status"], answer.json()["stage"]) == (200, "running", "prepare")
    assert answer.elapsed.total_seconds() < 5


def test_a_wait_for_what_has_ended_or_for_no_time_answers_at_once(start: Start) -> None:
    client = start()
    job_id = post(client).json()["id"]
    assert client.get(f"/jobs/{job_id}/wait?timeout_seconds=0").json()["status"] == "queued"
    client.post(f"/jobs/{job_id}/cancel")
    answer = client.get(f"/jobs/{job_id}/wait?timeout_seconds=60")
    assert answer.json()["status"] == "cancelled"
    assert answer.elapsed.total_seconds() < 5
    problem_of(client.get("/jobs/job_0/wait"), 404, "not_found")


@pytest.mark.parametrize("seconds", ["-1", "61", "nan", "inf", "-inf", "x", "1e400"])
def test_a_wait_out_of_range_is_422(client: TestClient, seconds: str) -> None:
    problem_of(client.get(f"/jobs/job_0/wait?timeout_seconds={seconds}"), 422, "invalid_input")


# What a job leaves --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def left(shared: TestClient) -> tuple[str, str]:
    ctx = context(shared)
    with ctx.db.write() as session:
        session.execute(delete(Job).where(Job.status == "queued"))
    return add_published(ctx.db, ctx.storage)


def test_artifacts_are_listed_with_their_hashes_and_come_whole(client: TestClient, left: tuple[str, str]) -> None:
    job = client.get(f"/jobs/{left[0]}").json()
    assert [a["name"] for a in job["artifacts"]] == sorted(ARTIFACTS)
    for artifact in job["artifacts"]:
        assert artifact["url"] == f"/jobs/{left[0]}/artifacts/{artifact['name']}"
        answer = client.get(artifact["url"])
        assert answer.content == ARTIFACTS[artifact["name"]]
        assert (answer.headers["etag"], answer.headers["accept-ranges"]) == (f'"{artifact["sha256"]}"', "bytes")
        assert int(answer.headers["content-length"]) == artifact["size_bytes"] == len(answer.content)
        assert answer.headers["x-content-type-options"] == "nosniff"


WEIGHTS = ARTIFACTS["adapter/adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=250-", 250, 256),
        ("bytes=-6", 250, 256),
        ("bytes=-999", 0, 256),
        ("bytes=250-999999999999", 250, 256),
        ("bytes=0-", 0, 256),
    ],
)
def test_a_range_is_206_and_says_which(
    client: TestClient, left: tuple[str, str], asked: str, start: int, stop: int
) -> None:
    path = f"/jobs/{left[0]}/artifacts/adapter/adapter_model.safetensors"
    answer = client.get(path, headers={"range": asked})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/256"
    assert int(answer.headers["content-length"]) == stop - start


@pytest.mark.parametrize("asked", ["bytes=256-", "bytes=256-300", "bytes=-0", "bytes=999999999999-"])
def test_a_range_past_the_end_is_416_and_tells_the_size(client: TestClient, left: tuple[str, str], asked: str) -> None:
    answer = client.get(f"/jobs/{left[0]}/artifacts/adapter/adapter_model.safetensors", headers={"range": asked})
    problem_of(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */256"


@pytest.mark.parametrize(
    "asked",
    ["bytes=-", "bytes=5-2", "lines=0-1", "bytes=0-1,4-5", "bytes=a-b", "x", "bytes=" + "9" * 5000 + "-", "bytes=²-"],
)
def test_a_range_nobody_understands_gives_the_whole_file(client: TestClient, left: tuple[str, str], asked: str) -> None:
    path = f"/jobs/{left[0]}/artifacts/adapter/adapter_model.safetensors"
    answer = client.get(path, headers={"range": asked.encode("latin-1")})  # type: ignore[dict-item]
    assert (answer.status_code, answer.content) == (200, WEIGHTS)


def test_a_range_of_another_version_gives_the_whole_file(client: TestClient, left: tuple[str, str]) -> None:
    path = f"/jobs/{left[0]}/artifacts/metrics.json"
    etag = client.get(path).headers["etag"]
    assert client.get(path, headers={"range": "bytes=0-1", "if-range": etag}).status_code == 206
    assert client.get(path, headers={"range": "bytes=0-1", "if-range": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "../metrics.json",
        "..%2fmetrics.json",
        "%2e%2e/%2e%2e/tuneproof.db",
        "%252e%252e%252ftuneproof.db",
        "metrics.json%00",
        "adapter",
        "adapter/",
        "adapter/%2e%2e/metrics.json",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "METRICS.JSON",
        "metrics.json/",
        "a" * 3000,
        "%ED%A0%80",
        "none.csv",
    ],
)
def test_an_artifact_of_an_odd_name_is_404(client: TestClient, left: tuple[str, str], name: str) -> None:
    problem_of(client.get(f"/jobs/{left[0]}/artifacts/{name}"), 404, "not_found")


def test_the_report_is_a_page_that_may_run_and_load_nothing(client: TestClient, left: tuple[str, str]) -> None:
    for path in ("report", "artifacts/report.html"):
        answer = client.get(f"/jobs/{left[0]}/{path}")
        assert answer.content == ARTIFACTS["report.html"]
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "sandbox" in policy
        assert "script-src" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    queued = post(client).json()["id"]
    problem_of(client.get(f"/jobs/{queued}/report"), 404, "not_found")


def test_after_the_dataset_is_deleted_the_texts_are_gone_and_the_figures_stay(start: Start) -> None:
    client = start(delete_grace_seconds=0)
    ctx = context(client)
    job_id, model_id = add_published(ctx.db, ctx.storage)
    job = client.get(f"/jobs/{job_id}").json()
    assert client.delete(f"/datasets/{job['dataset_id']}").status_code == 204
    for name in ("predictions.csv", "report.html"):
        problem_of(client.get(f"/jobs/{job_id}/artifacts/{name}"), 404, "not_found")
    assert client.get(f"/jobs/{job_id}/artifacts/metrics.json").status_code == 200
    assert client.get(f"/models/{model_id}").status_code == 200
    problem_of(client.post(f"/jobs/{job_id}/retry"), 409, "conflict")


# Models and aliases -------------------------------------------------------------------------------
def test_a_model_is_shown_listed_and_downloaded(client: TestClient, left: tuple[str, str]) -> None:
    shown = client.get(f"/models/{left[1]}").json()
    assert set(shown) == {"id", "name", "version", "method", "job_id", "base_model", "base_revision", "labels",
                          "created_at", "aliases", "metrics", "size_bytes"}  # fmt: skip
    assert (shown["job_id"], shown["labels"], shown["metrics"]) == (
        left[0],
        ["a", "b"],
        {"accuracy": 0.9, "macro_f1": 0.9},
    )
    assert client.get("/models").json()["data"] == [shown]
    assert client.get(f"/jobs/{left[0]}").json()["model_id"] == left[1]
    answer = client.get(f"/models/{left[1]}/download")
    assert answer.headers["content-type"] == "application/zip"
    assert int(answer.headers["content-length"]) == len(answer.content)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "manifest.json": b"{}", "sub/weights.bin": b"weights"
        }  # fmt: skip
    for path in ("/models/mdl_0", "/models/mdl_0/download", "/models/live"):
        problem_of(client.get(path), 404, "not_found")
    assert client.put("/aliases/live", json={"model_id": left[1]}).status_code == 200
    assert client.get("/models/live").json() == shown | {"aliases": ["live"]}
    assert client.get("/models/live/download").content == answer.content
    problem_of(client.delete("/models/live"), 404, "not_found")
    problem_of(client.delete("/models/mdl_0"), 404, "not_found")


def test_a_model_outlives_its_job_and_an_alias_outlives_a_delete(start: Start) -> None:
    client = start()
    ctx = context(client)
    made = [add_published(ctx.db, ctx.storage) for _ in range(2)]
    (first_job, first), (_, second) = made
    assert client.get(f"/models/{second}").json()["version"] == 2
    for model_id in (first, second, first):
        answer = client.put("/aliases/live", json={"model_id": model_id})
        assert (answer.status_code, answer.json()["model_id"]) == (200, model_id)
    assert client.get(f"/models/{first}").json()["aliases"] == ["live"]
    [alias] = client.get("/aliases").json()["data"]
    assert [move["model_id"] for move in alias["history"]] == [first, second, first]
    problem_of(client.delete(f"/models/{first}"), 409, "conflict")
    assert client.delete(f"/jobs/{first_job}").status_code == 204
    assert client.get(f"/models/{first}/download").status_code == 200
    assert client.delete(f"/models/{second}").status_code == 204
    problem_of(client.put("/aliases/live", json={"model_id": second}), 404, "not_found")
    assert client.get("/aliases").json()["data"][0]["model_id"] == first


@pytest.mark.parametrize("alias", ["live", "0", "a" * 64, "a.b_c-d", "mdl"])
def test_an_alias_of_the_pattern_is_allowed(client: TestClient, left: tuple[str, str], alias: str) -> None:
    assert client.put(f"/aliases/{alias}", json={"model_id": left[1]}).status_code == 200


@pytest.mark.parametrize(
    "alias", ["Live", "-a", ".a", "_a", "a" * 65, "a b", "a%0A", "mdl_0", "mdl_x", "%C3%A4", "a%00", "%ED%A0%80"]
)
def test_an_alias_of_another_pattern_is_422(client: TestClient, left: tuple[str, str], alias: str) -> None:
    problem_of(client.put(f"/aliases/{alias}", json={"model_id": left[1]}), 422, "invalid_input")


@pytest.mark.parametrize(
    "raw", ["{}", '{"model_id": 1}', '{"model_id": "mdl_0", "x": 1}', '{"model_id": "\\ud800"}', "[]", "", "[" * 60_000]
)
def test_a_broken_alias_body_is_422(client: TestClient, raw: str) -> None:
    answer = client.put("/aliases/live", content=raw, headers={"content-type": "application/json"})
    problem_of(answer, 422, "invalid_input")


def test_a_job_that_was_stored_by_hand_shows_nothing_of_its_lease(client: TestClient, left: tuple[str, str]) -> None:
    text = client.get(f"/jobs/{left[0]}").text + client.get(f"/models/{left[1]}").text
    for secret in ("lease", "token", "storage", "worker_id", "checkpoint_prefix"):
        assert secret not in text


def test_a_publish_that_meets_a_used_name_takes_the_next_version(start: Start) -> None:
    client = start()
    db = context(client).db
    for method in ("embedding_logreg", "lora"):
        add_job(db)
        publish_stored(db, claim(db).lease, [], [model(method)], {}, START, GRACE)
    versions = [(made["method"], made["version"]) for made in client.get("/models").json()["data"]]
    assert versions == [("lora", 2), ("embedding_logreg", 1)]
    assert client.get("/jobs?status=succeeded").json()["data"][1]["model_id"] is None


def test_what_a_refusal_raises_is_an_app_error() -> None:
    from service.api.context import parse_json

    with pytest.raises(AppError):
        parse_json(JobSpec, '{"name": "\ud800"}')


def test_an_artifact_whose_bytes_are_gone_is_not_found_before_anything_is_answered(start: Start) -> None:
    client = start()
    ctx = context(client)
    job_id, _model = add_published(ctx.db, ctx.storage)
    ctx.storage.delete(f"jobs/{job_id}")
    problem_of(client.get(f"/jobs/{job_id}/artifacts/metrics.json"), 404, "not_found")


def test_a_job_that_labelled_a_file_cannot_be_compared_and_says_so(start: Start) -> None:
    client = start()
    db = context(client).db
    for _ in range(2):
        add_job(db)
        publish_stored(db, claim(db).lease, [], [], {"headline": "labelled"}, START, GRACE)
    ids = [job["id"] for job in client.get("/jobs").json()["data"]]
    answer = client.get("/compare", params={"jobs": ",".join(ids)})
    assert "labelled a file" in problem_of(answer, 409, "conflict")["detail"]


def test_a_csv_is_given_for_spreadsheets_and_other_files_are_not(start: Start) -> None:
    client = start()
    ctx = context(client)
    job_id, _model = add_published(ctx.db, ctx.storage)
    url = f"/jobs/{job_id}/artifacts"
    with ctx.db.read() as session:
        key = session.scalars(select(Artifact.storage_key).where(Artifact.name == "predictions.csv")).one()
    ctx.storage.delete(key)
    ctx.storage.put(io.BytesIO(b"row_id,text\n0,=1+1\n"), key)
    answer = client.get(f"{url}/predictions.csv", params={"safe": "spreadsheet"})
    assert answer.content == b"row_id,text\r\n0,'=1+1\r\n"
    assert answer.headers["content-type"].startswith("text/csv")
    assert client.get(f"{url}/predictions.csv").content.startswith(b"row_id,text\n0,=1+1")
    problem_of(client.get(f"{url}/metrics.json", params={"safe": "spreadsheet"}), 422, "invalid_input")
    problem_of(client.get(f"{url}/predictions.csv", params={"safe": "yes"}), 422, "invalid_input")
    ctx.storage.delete(key)
    problem_of(client.get(f"{url}/predictions.csv", params={"safe": "spreadsheet"}), 404, "not_found")
