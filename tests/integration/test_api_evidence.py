"""`/jobs/{id}/flips` and `/compare`: files as the worker writes them, read back through the API."""

import csv
import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sklearn.metrics import accuracy_score, f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from service.core.ids import new_id
from service.db import catalog, jobs
from service.db.jobs import NewArtifact
from service.ml.evidence import same_texts
from service.ml.labels import LabelSet
from service.ml.split import Table, split_rows, stratified_subset
from tests.problems import problem_of
from tests.rows import GRACE, START, add_job, claim
from tests.storing import put_folder
from worker.artifacts import flips, write_flips, write_json, write_predictions, write_split
from worker.compare import MethodAnswers, compare_all
from worker.predictions import Predictions

LABELS = LabelSet(("card, lost", "fee", 'the "other"'))
SHARES = {"train": 0.4, "validation": 0.1, "test": 0.5}
N = 240

Leave = Callable[..., str]


BREAKS = ("\n", "\r", "\r\n")


def table(n: int = N, seed: int = 0) -> Table:
    """Texts of which some are equal once folded, with line breaks, commas and quotes in them."""
    rng = np.random.default_rng(seed)
    texts = tuple(
        f'Text {i % (n - 20)},{BREAKS[i % 3]}"said" he' if i < n - 20 else f'TEXT {i % (n - 20)}, "said"  he'
        for i in range(n)
    )
    return Table(np.arange(n) * 2, texts, rng.integers(0, len(LABELS), n), LABELS, np.array([1, 3]))


@pytest.fixture
def leave(shared: TestClient, tmp_path: Path) -> Leave:
    """Leaves a succeeded job whose methods are right so often, silent at 0; prompts are asked the subset only."""
    context = shared.app.state.context  # type: ignore[attr-defined]

    def left(
        accuracies: dict[str, float], *, seed: int = 42, answers_seed: int = 0, sample_size: int = 60,
        rows: Table | None = None, sha256: str = "ab" * 32, recommended: str = "lora",
        relabelled: bool = False,
    ) -> str:  # fmt: skip
        rows, folder, rng = rows or table(), tmp_path / new_id("out"), np.random.default_rng(answers_seed)
        folder.mkdir()
        split = split_rows(rows.texts, rows.label_ids, SHARES, seed)  # type: ignore[arg-type]
        if relabelled:
            rows = replace(rows, label_ids=(rows.label_ids + 1) % len(LABELS))
        true_ids, texts = rows.label_ids[split.test], [rows.texts[i] for i in split.test]
        subset = stratified_subset(texts, true_ids, sample_size, seed)
        answers, judged, methods = {}, {}, {}
        for method, accuracy in accuracies.items():
            wrong = rng.integers(-1, len(LABELS) if accuracy else 0, len(true_ids))
            ids = np.where(rng.random(len(true_ids)) < accuracy, true_ids, wrong)
            prompted = method.endswith("_prompt")
            parts = {"baseline_subset": Predictions(ids[subset])} | ({} if prompted else {"test": Predictions(ids)})
            text_ids = same_texts(texts)
            judged[method] = MethodAnswers(
                true_ids, true_ids[subset], None if prompted else ids, ids[subset], text_ids, text_ids[subset]
            )
            answers[method] = parts
            scored = slice(None) if not prompted else subset
            methods[method] = {
                "accuracy": accuracy_score(true_ids[scored], ids[scored]),
                "macro_f1": f1_score(true_ids[scored], ids[scored], labels=range(3), average="macro", zero_division=0),
                "on": "baseline_subset" if prompted else "test", "model_id": None,
            }  # fmt: skip
        comparisons = compare_all(judged, len(LABELS), seed)
        write_split(folder / "split.csv", rows, split)
        write_predictions(folder / "predictions.csv", rows, split, subset, answers)
        write_flips(folder / "flips.csv", flips(rows, split, subset, answers, comparisons))
        write_json(
            folder / "metrics.json",
            {
                "dataset": {"sha256": sha256}, "labels": list(LABELS.names),
                "split": {"seed": seed, "algorithm": "a-1"},
                "comparison": [asdict(comparison) for comparison in comparisons],
            },
        )  # fmt: skip
        add_job(context.db)
        lease = claim(context.db).lease
        stored = put_folder(context.storage, folder, lease.prefix)
        found = [
            NewArtifact(file.key.rpartition("/")[2], file.size_bytes, file.sha256, file.key, file.key.endswith(".csv"))
            for file in stored
        ]
        summary = {"headline": "", "recommendation": {"method": recommended}, "methods": methods}
        jobs.publish(context.db, lease, found, [], summary, START, GRACE)
        return lease.job_id

    return left


def predictions(client: TestClient, job_id: str) -> list[dict[str, str]]:
    content = client.get(f"/jobs/{job_id}/artifacts/predictions.csv").content.decode()
    return [row for row in csv.DictReader(io.StringIO(content, newline="")) if row["split"] == "test"]


def compared(client: TestClient, *names: str) -> Any:
    answer = client.get("/compare", params={"jobs": ",".join(names)})
    assert answer.status_code == 200, answer.text
    return answer.json()


METHODS = {"majority": 0.3, "tfidf_logreg": 0.7, "zero_shot_prompt": 0.5, "lora": 0.9}


# Flips --------------------------------------------------------------------------------------------
def test_the_flips_of_a_comparison_are_the_rows_one_side_alone_has_right(shared: TestClient, leave: Leave) -> None:
    job_id = leave(METHODS)
    rows = predictions(shared, job_id)
    metrics = shared.get(f"/jobs/{job_id}/artifacts/metrics.json").json()
    assert len(metrics["comparison"]) == 5
    for pair in metrics["comparison"]:
        sides = {side: pair[side] for side in ("candidate", "baseline")}
        found = shared.get(f"/jobs/{job_id}/flips", params=sides | {"limit": 200}).json()
        assert found["has_more"] is False
        on = [row for row in rows if pair["on"] == "test" or row["in_baseline_subset"] == "1"]
        expected = [
            (
                int(row["row_id"]),
                row["text"],
                row["label"],
                row[sides["candidate"]] or None,
                row[sides["baseline"]] or None,
            )
            for row in on
            if (row[sides["candidate"]] == row["label"]) != (row[sides["baseline"]] == row["label"])
        ]
        keys = ("row_id", "text", "label", "candidate_answer", "baseline_answer")
        assert [tuple(flip[key] for key in keys) for flip in found["data"]] == expected
        flips = [flip["flip"] for flip in found["data"]]
        assert (flips.count("fixed"), flips.count("broken")) == (pair["n_fixed"], pair["n_broken"])
        assert all((flip["candidate_answer"] == flip["label"]) == (flip["flip"] == "fixed") for flip in found["data"])


def test_pages_of_flips_join_up_and_a_label_picks_its_own(shared: TestClient, leave: Leave) -> None:
    job_id = leave(METHODS)
    whole = shared.get(f"/jobs/{job_id}/flips", params={"limit": 200}).json()["data"]
    pages, after = [], 0
    while True:
        page = shared.get(f"/jobs/{job_id}/flips", params={"limit": 7, "after": after}).json()
        pages += page["data"]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 7
        after = page["data"][-1]["id"]
    assert pages[:200] == whole
    assert [flip["id"] for flip in pages] == list(range(1, len(pages) + 1))
    label = 'the "other"'
    of_label = shared.get(f"/jobs/{job_id}/flips", params={"limit": 200, "label": label}).json()["data"]
    assert of_label == [flip for flip in pages if flip["label"] == label][:200] != []
    for flip in ("fixed", "broken"):
        of_side = shared.get(f"/jobs/{job_id}/flips", params={"limit": 200, "flip": flip}).json()["data"]
        assert of_side == [one for one in pages if one["flip"] == flip][:200] != []
    assert shared.get(f"/jobs/{job_id}/flips", params={"label": "nobody's"}).json() == {"data": [], "has_more": False}


def test_a_job_without_flips_says_so(shared: TestClient, leave: Leave) -> None:
    job_id = add_job(shared.app.state.context.db)  # type: ignore[attr-defined]
    for path in (f"/jobs/{job_id}/flips", "/jobs/job_none/flips"):
        problem_of(shared.get(path), 404, "not_found")
    for asked in (
        {"limit": 0},
        {"limit": 201},
        {"after": -1},
        {"after": "job_1"},
        {"candidate": "x" * 65},
        {"flip": "x"},
    ):
        problem_of(shared.get(f"/jobs/{job_id}/flips", params=asked), 422, "invalid_input")
    claim(shared.app.state.context.db)  # type: ignore[attr-defined]


# Jobs beside each other ---------------------------------------------------------------------------
def test_each_later_job_is_compared_with_the_first_as_statsmodels_would(shared: TestClient, leave: Leave) -> None:
    names = [leave({"majority": 0.3, "lora": accuracy}, answers_seed=i) for i, accuracy in enumerate((0.6, 0.8, 0.65))]
    found = compared(shared, *names)
    assert list(found["methods"]) == [f"{name}/lora" for name in names]
    assert [(pair["candidate"], pair["baseline"], pair["on"]) for pair in found["comparison"]] == [
        (f"{name}/lora", f"{names[0]}/lora", "test") for name in names[1:]
    ]
    tables = [predictions(shared, name) for name in names]
    right = [np.array([row["lora"] == row["label"] for row in rows]) for rows in tables]
    p_values = []
    for pair, ours in zip(found["comparison"], right[1:], strict=True):
        n_fixed, n_broken = int((ours & ~right[0]).sum()), int((right[0] & ~ours).sum())
        assert (pair["n"], pair["n_fixed"], pair["n_broken"]) == (len(ours), n_fixed, n_broken)
        p_values.append(mcnemar([[0, n_fixed], [n_broken, 0]], exact=True).pvalue)
        assert pair["mcnemar_p"] == pytest.approx(p_values[-1], abs=1e-9)
        assert pair["accuracy_delta"] == pytest.approx(ours.mean() - right[0].mean())
        assert pair["n_texts"] == len({" ".join(row["text"].casefold().split()) for row in tables[0]}) < pair["n"]
    corrected = multipletests(p_values, method="holm")[1]
    assert [pair["mcnemar_p_holm"] for pair in found["comparison"]] == pytest.approx(list(corrected), abs=1e-9)
    assert found["comparison"][0]["verdict"] == "candidate_wins"
    assert found["methods"][f"{names[1]}/lora"]["accuracy"] == pytest.approx(right[1].mean())
    split = shared.get(f"/jobs/{names[0]}/artifacts/split.csv").content
    assert found["split"] == {"algorithm": "a-1", "seed": 42, "sha256": hashlib.sha256(split).hexdigest()}
    assert found["dataset_sha256"] == "ab" * 32


def test_a_job_says_the_same_of_itself_as_its_own_figures_do(shared: TestClient, leave: Leave) -> None:
    job_id = leave(METHODS)
    own = shared.get(f"/jobs/{job_id}/artifacts/metrics.json").json()["comparison"]
    for pair in own:
        sides = [f"{job_id}/{pair[side]}" for side in ("baseline", "candidate")]
        [found] = compared(shared, *sides)["comparison"]
        alone = {"mcnemar_p_holm", "verdict", "candidate", "baseline"}
        assert {k: v for k, v in found.items() if k not in alone} == {k: v for k, v in pair.items() if k not in alone}


def test_prompts_asked_different_samples_are_compared_on_the_rows_both_were_asked(
    shared: TestClient, leave: Leave
) -> None:
    few = leave({"zero_shot_prompt": 0.8}, sample_size=30, recommended="zero_shot_prompt")
    more = leave({"zero_shot_prompt": 0.7, "lora": 0.9}, sample_size=70)
    [pair] = compared(shared, few, f"{more}/zero_shot_prompt")["comparison"]
    samples = [
        {row["row_id"] for row in predictions(shared, job) if row["in_baseline_subset"] == "1"} for job in (few, more)
    ]
    assert (pair["on"], pair["n"]) == ("baseline_subset", len(samples[0] & samples[1]))
    assert pair["candidate"] == f"{more}/zero_shot_prompt"
    assert compared(shared, few, more)["comparison"][0]["n"] == 30


def test_nothing_wins_that_does_not_beat_a_constant_answer(shared: TestClient, leave: Leave) -> None:
    silent = leave({"zero_shot_prompt": 0.0}, recommended="zero_shot_prompt", sample_size=200)
    at_chance = leave({"lora": 0.12}, answers_seed=3)
    [pair] = compared(shared, silent, at_chance)["comparison"]
    assert pair["mcnemar_p_holm"] < 0.001
    assert pair["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"seed": 7}, "a-1 with seed 42 and a-1 with seed 7"),
        ({"sha256": "cd" * 32}, "different datasets"),
        ({"rows": table(N + 3)}, "other shares, columns or dropped labels"),
        ({"relabelled": True}, "their labels differ"),
    ],
)
def test_other_rows_are_refused_with_the_reason(
    shared: TestClient, leave: Leave, given: dict[str, Any], reason: str
) -> None:
    names = [leave({"lora": 0.8}), leave({"lora": 0.8}, **given)]
    problem = problem_of(shared.get("/compare", params={"jobs": ",".join(names)}), 409, "conflict")
    assert reason in problem["detail"]


def test_jobs_that_cannot_be_compared_are_refused(shared: TestClient, leave: Leave) -> None:
    context = shared.app.state.context  # type: ignore[attr-defined]
    done, waiting = leave({"lora": 0.8}), add_job(context.db)
    claim(context.db)
    for asked, status, code in (
        ("", 422, "invalid_input"), (done, 422, "invalid_input"), (f"{done},{done}", 422, "invalid_input"),
        (",".join(f"job_{i}" for i in range(11)), 422, "invalid_input"), (f"{done},job_none", 404, "not_found"),
        (f"{done},{done}/tfidf_logreg", 422, "invalid_input"), (f"{done},{waiting}", 409, "conflict"),
    ):  # fmt: skip
        problem_of(shared.get("/compare", params={"jobs": asked}), status, code)
    problem_of(shared.get("/compare"), 422, "invalid_input")


def test_what_holds_texts_goes_with_the_dataset_and_the_answer_says_so(shared: TestClient, leave: Leave) -> None:
    context = shared.app.state.context  # type: ignore[attr-defined]
    names = [leave({"majority": 0.3, "lora": 0.8}), leave({"majority": 0.3, "lora": 0.7}, answers_seed=1)]
    dataset_id = shared.get(f"/jobs/{names[1]}").json()["dataset_id"]
    with context.db.write() as session:
        catalog.remove_dataset(session, dataset_id, START, GRACE)
    problem_of(shared.get(f"/jobs/{names[1]}/flips"), 404, "not_found")
    problem = problem_of(shared.get("/compare", params={"jobs": ",".join(names)}), 409, "conflict")
    assert "went with its dataset" in problem["detail"]
