"""`GET /datasets/{id}/preflight`; looking happens in this process here, but for the tests that are about that."""

import io
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api import preflight
from service.core.errors import OutOfMemory
from service.db import jobs
from service.db.jobs import NewArtifact
from service.ml.base_models import EMBEDDED
from service.ml.preflight import look
from tests.problems import problem_of
from tests.rows import GRACE, START, add_dataset, add_job, claim
from tests.tiny import labelled_texts

Start = Callable[..., TestClient]


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "apart" not in request.fixturenames:
        monkeypatch.setattr(preflight, "_look_in_a_process_of_its_own", look)


@pytest.fixture
def apart() -> None:
    """Looks in a process of its own, as the service does."""


def uploaded(client: TestClient, **form: str) -> str:
    texts, labels = labelled_texts(120, seed=2)
    rows = [*zip(texts, labels, strict=True), (texts[0], labels[1])]
    content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    answer = client.post("/datasets", files={"file": ("t.csv", content)}, data=form)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.mark.usefixtures("apart")
def test_a_dataset_is_looked_at_in_another_process_before_any_compute(shared: TestClient) -> None:
    dataset_id = uploaded(shared)
    answer = shared.get(f"/datasets/{dataset_id}/preflight?max_length=8&seed=7&train=0.6&validation=0.2&test=0.2")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["dataset_id"] == dataset_id
    split = body["split"]
    assert (split["algorithm"], split["seed"]) == ("stratified-grouped-sha256-v1", 7)
    assert split["n_train"] + split["n_validation"] + split["n_test"] == 121
    assert abs(split["n_test"] - 24) <= 2
    assert {"conflicting_labels", "truncated_text"} <= {warning["code"] for warning in body["warnings"]}
    assert set(body["near_duplicates"]) == {"count", "pairs", "sampled"}
    assert (body["truncation"]["base_model"], body["truncation"]["max_length"]) == (EMBEDDED, 8)
    assert body["truncation"]["by_label"][0]["n_truncated"] > 0
    assert body["eta"]["lora"]["basis"] == "two-core CPU"
    assert body["eta"]["lora"]["seconds"] > body["eta"]["embedding_logreg"]["seconds"] > 0
    assert body["eta"]["zero_shot_prompt"] == {"seconds": None, "basis": None}


@pytest.mark.usefixtures("apart")
def test_a_process_that_is_lost_is_told_and_the_next_one_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "look", os._exit)
    for _ in range(2):
        with pytest.raises(OutOfMemory, match="memory"):
            preflight._look_in_a_process_of_its_own(3)


@pytest.mark.usefixtures("apart")
def test_while_one_is_under_way_another_is_told_to_come_again(shared: TestClient) -> None:
    dataset_id = uploaded(shared)
    with preflight._one_at_a_time:
        problem_of(shared.get(f"/datasets/{dataset_id}/preflight"), 429, "queue_full")


def test_the_newest_finished_job_on_the_same_base_is_the_basis(start: Start) -> None:
    client = start()
    dataset_id = uploaded(client)
    context = client.app.state.context  # type: ignore[attr-defined]
    for hour, (tokens_per_second, base_model) in enumerate(
        ((10.0, EMBEDDED), (1000.0, EMBEDDED), (77.0, "f2llm-0.6b"))
    ):
        job_id = add_job(context.db)
        lease = claim(context.db).lease
        jobs.report(context.db, lease, START, spec={"base_model": base_model})
        metrics = {
            "split": {"n_train": 10},
            "training": {"tokens_per_second": tokens_per_second, "train_seconds": 10.0, "epochs_run": 2},
            "methods": {"lora": {"test": {"seconds_per_row": 0.01}}},
        }
        stored = context.storage.put(io.BytesIO(json.dumps(metrics).encode()), f"{lease.prefix}/metrics.json")
        artifact = NewArtifact("metrics.json", stored.size_bytes, stored.sha256, stored.key, False)
        jobs.publish(context.db, lease, [artifact], [], {"headline": "fine"}, START + timedelta(hours=hour), GRACE)
        if tokens_per_second == 1000.0:
            expected = job_id
    eta = client.get(f"/datasets/{dataset_id}/preflight").json()["eta"]
    assert eta["lora"]["basis"] == eta["embedding_logreg"]["basis"] == expected


def test_a_listed_base_that_is_not_at_hand_is_a_warning(shared: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    body = shared.get(f"/datasets/{uploaded(shared)}/preflight?base_model=f2llm-0.6b").json()
    assert body["truncation"] is None
    assert "base_model_not_at_hand" in {warning["code"] for warning in body["warnings"]}
    assert body["eta"]["lora"] == {"seconds": None, "basis": None}


@pytest.mark.parametrize(
    ("query", "code", "loc"),
    [
        ("base_model=gpt-9", "unknown_base_model", ["base_model"]),
        ("max_length=513", "invalid_input", ["train", "max_length"]),
        ("max_length=7", "invalid_input", ["query", "max_length"]),
        ("seed=-1", "invalid_input", ["query", "seed"]),
        ("train=0.9", "invalid_input", ["query"]),
        ("train=nan", "invalid_input", ["query", "train"]),
        ("epochs=3", "invalid_input", ["query", "epochs"]),
    ],
)
def test_values_that_no_job_takes_are_422(shared: TestClient, query: str, code: str, loc: list[Any]) -> None:
    body = problem_of(shared.get(f"/datasets/{uploaded(shared)}/preflight?{query}"), 422, code)
    assert body["errors"][0]["loc"] == loc


def test_without_labels_without_bytes_or_without_a_dataset_there_is_nothing_to_look_at(shared: TestClient) -> None:
    unlabelled = shared.post("/datasets", files={"file": ("t.csv", "text\na b\nc d\n")}, data={"labelled": "false"})
    problem_of(shared.get(f"/datasets/{unlabelled.json()['id']}/preflight"), 422, "invalid_data")
    problem_of(shared.get("/datasets/ds_0/preflight"), 404, "not_found")


@pytest.mark.usefixtures("apart")
def test_a_dataset_that_is_deleted_while_it_is_looked_at_is_404(shared: TestClient) -> None:
    dataset_id = add_dataset(shared.app.state.context.db)  # type: ignore[attr-defined]
    problem_of(shared.get(f"/datasets/{dataset_id}/preflight"), 404, "not_found")
