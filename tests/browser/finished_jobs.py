"""Jobs as a worker leaves them, in its own files, without the training: what the pages of results are shown on."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from sqlalchemy import update

from service.core.ids import new_id
from service.db import catalog
from service.db.jobs import NewArtifact
from service.db.models import Dataset, Job
from service.ml.dataset import TableFormat
from service.ml.evidence import same_texts
from service.ml.split import PARTS, read_split, stratified_subset
from service.storage import StoredText
from tests.rows import GRACE, START, add_job, claim, model, publish_stored
from tests.storing import put_folder
from worker.artifacts import flips, write_flips, write_json, write_predictions, write_split
from worker.compare import MethodAnswers, compare_all, unproven
from worker.metrics import score
from worker.predictions import Predictions
from worker.report import render
from worker.verdict import judge

SHARES = {"train": 0.5, "validation": 0.1, "test": 0.4}
SERVED = ("embedding_logreg", "lora")
HOLDS_TEXTS = ("predictions.csv", "flips.csv", "report.html")


@dataclass(frozen=True)
class Finished:
    """A succeeded job.

    Args:
        id: Its id.
        dataset_id: Its dataset's.
        labels: In the order of their ids.
        metrics: Its metrics.json.
        flips: The rows of its flips.csv.
        answers: By method, label ids of the rows it was run on.
        true_ids: `(N,)` of the test rows.
        model_ids: By served method.
    """

    id: str
    dataset_id: str
    labels: list[str]
    metrics: dict[str, Any]
    flips: list[dict[str, str]]
    answers: dict[str, Any]
    true_ids: Any
    model_ids: dict[str, str]


def leave(
    context: Any, url: str, folder: Path, accuracies: Mapping[str, float], labels: Sequence[str],
    texts: Sequence[str], *, kind: str = "experiment", name: str = "tickets", learning_curve: bool = False,
    sample_size: int = 100, seed: int = 0,
) -> Finished:  # fmt: skip
    """A succeeded job on an uploaded file, whose methods are right about so often; prompts on the subset alone.

    The texts get the labels in turn.
    """
    rng, n = np.random.default_rng(seed), len(texts)
    dataset = _uploaded(context, url, texts, [labels[i % len(labels)] for i in range(n)])
    file, how = StoredText(context.storage, dataset.storage_key), TableFormat(**dataset.profile["format"])
    table, split, algorithm = read_split(file, how, SHARES, 42)  # type: ignore[arg-type]
    labels, K = table.labels.names, len(labels)
    true_ids, tested = table.label_ids[split.test], [table.texts[i] for i in split.test]
    subset, text_ids = stratified_subset(tested, true_ids, sample_size, 42), same_texts(tested)
    answers: dict[str, dict[str, Predictions]] = {}
    for method, accuracy in accuracies.items():
        wrong = (true_ids + rng.integers(1, K, len(true_ids))) % K
        ids = np.where(rng.random(len(true_ids)) < accuracy, true_ids, wrong)
        if method.endswith("_prompt"):
            ids[rng.random(len(ids)) < 0.1] = -1
            outcomes = tuple("invalid" if i < 0 else "valid" for i in ids)
            answers[method] = {"baseline_subset": Predictions(ids, None, outcomes, outcomes, 0.2).take(subset)}  # type: ignore[arg-type]
            continue
        logits = rng.normal(0, 1, (len(ids), K))
        logits[np.arange(len(ids)), ids] = logits.max(axis=1) + rng.exponential(2, len(ids))
        made = Predictions.of_logits(logits, 1.3, 0.004) if method != "majority" else Predictions(ids)
        answers[method] = {"test": made, "baseline_subset": made.take(subset)}
    judged = {
        method: MethodAnswers(
            true_ids, true_ids[subset], parts["test"].label_ids if "test" in parts else None,
            parts["baseline_subset"].label_ids, text_ids, text_ids[subset],
        )
        for method, parts in answers.items()
    }  # fmt: skip
    on = {"test": true_ids, "baseline_subset": true_ids[subset]}
    figures = {
        method: {part: score(found, on[part], labels) for part, found in parts.items()}
        for method, parts in answers.items()
    }
    comparisons = compare_all(judged, K, 42)
    headline, recommendation = judge(judged, comparisons, 0.02, K, 42, 0.1)
    metrics = {
        "schema_version": 1, "job_id": "", "labels": list(labels), "methods": figures,
        "dataset": {"id": dataset.id, "sha256": dataset.sha256, "n_rows": n},
        "split": {"seed": 42, "algorithm": algorithm, "n_dropped": 0}
        | {f"n_{part}": len(split.part(part)) for part in PARTS},
        "baseline_subset": {"n": len(subset), "drawn_from": "test", "seed": 42},
        "comparison": [asdict(comparison) for comparison in comparisons],
        "training": _training() if "lora" in answers else None,
        "learning_curve": _curve(figures, len(split.train)) if learning_curve else [],
        "overtakes": None,
        "environment": {"base_model": "minilm", "threads": 2, "libraries": {"torch": "2.13.0"}},
    }  # fmt: skip
    if learning_curve:
        metrics["overtakes"] = {
            "method": "lora", "n_train": 100, "prompt": "zero_shot_prompt", "n": len(subset), "caveat": "A caveat.",
            "prompt_accuracy": figures["zero_shot_prompt"]["baseline_subset"]["accuracy"],
        }  # fmt: skip
    out = folder / new_id("out")
    out.mkdir(parents=True)
    write_split(out / "split.csv", table, split)
    write_predictions(out / "predictions.csv", table, split, subset, answers)
    changed = flips(table, split, subset, answers, comparisons)
    write_flips(out / "flips.csv", changed)
    write_json(out / "metrics.json", metrics)
    served = [model(method, labels=list(labels)) for method in SERVED if method in answers and kind != "baseline"]
    ids = {made.method: made.id for made in served}
    summary = {
        "headline": headline,
        "recommendation": asdict(recommendation),
        "methods": {
            method: {"accuracy": of["accuracy"], "macro_f1": of["macro_f1"], "on": on, "model_id": ids.get(method)}
            for method, parts in figures.items()
            for on, of in [next(iter(parts.items()))]
        },
    }
    notes = {"job_name": name, "dataset_name": name, "warnings": [], "messages": [], "spec": {},
             "unproven": unproven(judged, comparisons)}  # fmt: skip
    (out / "report.html").write_text(render(metrics, summary, notes, changed), encoding="utf-8")
    add_job(context.db, dataset.id, name=name)
    lease = claim(context.db).lease
    with context.db.write() as session:
        session.execute(update(Job).where(Job.id == lease.job_id).values(kind=kind))
    stored = put_folder(context.storage, out, lease.prefix)
    files = [(file, file.key.removeprefix(f"{lease.prefix}/")) for file in stored]
    left = [NewArtifact(own, f.size_bytes, f.sha256, f.key, own in HOLDS_TEXTS) for f, own in files]
    publish_stored(context.db, lease, left, served, summary, START, GRACE)
    kept = {method: next(iter(parts.values())).label_ids for method, parts in answers.items()}
    return Finished(lease.job_id, dataset.id, list(labels), metrics, changed, kept, true_ids, ids)


def _uploaded(context: Any, url: str, texts: Sequence[str], labels: Sequence[str]) -> Dataset:
    content = io.StringIO(newline="")
    csv.writer(content, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    answer = httpx.post(f"{url}/datasets", files={"file": content.getvalue().encode()}, timeout=60)
    assert answer.status_code == 201, answer.text
    with context.db.read() as session:
        return catalog.get_dataset(session, answer.json()["id"])


def _training() -> dict[str, Any]:
    return {
        "epochs_run": 3, "best_epoch": 2, "best_validation_macro_f1": 0.9, "trainable_parameters": 7,
        "total_parameters": 1000, "train_seconds": 61.7, "tokens_per_second": 3120.4, "peak_memory_bytes": 2**30,
        "precision": "bf16", "gradient_checkpointing": False, "truncated_texts": 4,
    }  # fmt: skip


def _curve(figures: Mapping[str, Any], n_train: int) -> list[dict[str, Any]]:
    trained = [method for method in ("tfidf_logreg", "embedding_logreg", "lora") if method in figures]
    return [
        {
            "share": share,
            "n_train": round(share * n_train),
            "methods": {
                method: {"accuracy": share**0.2 * figures[method]["test"]["accuracy"], "macro_f1": 0.5,
                         "subset_accuracy": 0.5}
                for method in trained
            },
        }
        for share in (0.1, 0.5, 1.0)
    ]  # fmt: skip
