"""The whole way on real data, through real HTTP and real processes: `make acceptance`.

Every figure the service reports is computed again here, from `predictions.csv` alone, with scikit-learn and scipy.
"""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """API and worker as `tuneproof up` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("data")
    env = os.environ | {"TUNEPROOF_DATA_DIR": str(folder), "TUNEPROOF_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("tuneproof")), "up"], env=env, start_new_session=True
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=70) as client:
        _until(lambda: _ready(client), 120)
        yield client
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 0


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"


def run(client: httpx.Client, file: Path, **fields: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, str]]]:
    """Job, metrics and predictions of one experiment on `file`."""
    with file.open("rb") as stream:
        answer = client.post("/jobs", files={"file": (file.name, stream)}, data=fields)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    while not job["terminal"]:
        job = client.get(f"/jobs/{job['id']}/wait", params={"timeout_seconds": 60}).json()
    assert job["status"] == "succeeded", job["error"]
    artifact = f"/jobs/{job['id']}/artifacts"
    metrics = client.get(f"{artifact}/metrics.json").json()
    text = client.get(f"{artifact}/predictions.csv").content.decode()
    print(json.dumps({"headline": job["summary"]["headline"], **job["summary"]["recommendation"]}, indent=1))
    print(json.dumps({k: round(v["accuracy"], 4) for k, v in job["summary"]["methods"].items()}), metrics["training"])
    return job, metrics, list(csv.DictReader(text.splitlines(keepends=True)))


def check_figures(metrics: dict[str, Any], rows: list[dict[str, str]]) -> None:
    """Every score and every p-value, again."""
    labels = metrics["labels"]
    number = {label: i for i, label in enumerate(labels)}
    parts = {
        "test": [row for row in rows if row["split"] == "test"],
        "validation": [row for row in rows if row["split"] == "validation"],
        "baseline_subset": [row for row in rows if row["in_baseline_subset"] == "1"],
    }
    for method, scored in metrics["methods"].items():
        for part, figures in scored.items():
            true = [number[row["label"]] for row in parts[part]]
            given = [number.get(row[method], len(labels)) for row in parts[part]]
            assert figures["n"] == len(true)
            assert figures["accuracy"] == pytest.approx(accuracy_score(true, given), abs=1e-12)
            for average in ("macro", "weighted"):
                f1 = f1_score(true, given, labels=range(len(labels)), average=average, zero_division=0)
                assert figures[f"{average}_f1"] == pytest.approx(f1, abs=1e-12)
            matrix = confusion_matrix(true, given, labels=range(len(labels) + 1))[:-1]
            assert figures["confusion_matrix"] == matrix.tolist()
            if "log_loss" in figures:
                probability = np.array([float(row[f"{method}_label_probability"]) for row in parts[part]])
                two = np.column_stack([1 - probability, probability])
                loss = log_loss(np.ones(len(two)), two, labels=[0, 1])
                assert figures["log_loss"] == pytest.approx(loss, rel=1e-6)
    check_comparisons(metrics, parts, number)


def check_comparisons(
    metrics: dict[str, Any], parts: dict[str, list[dict[str, str]]], number: dict[str, int]
) -> None:  # fmt: skip
    """Every difference, interval, p and verdict, again, with scipy; equal texts are drawn and counted as one."""
    by_row, by_text = [], []
    for pair in metrics["comparison"]:
        chosen = parts[pair["on"]]
        sides = (pair["candidate"], pair["baseline"])
        true, *given = (np.array([number.get(row[name], -1) for row in chosen]) for name in ("label", *sides))
        gained = 1 * (given[0] == true) - (given[1] == true)
        folded = [" ".join(row["text"].casefold().split()) for row in chosen]
        texts = np.unique(folded, return_inverse=True)[1]
        votes = np.sign(np.bincount(texts, gained))
        n_rows = np.bincount(texts)
        fixed, broken = int((gained > 0).sum()), int((gained < 0).sum())
        assert (pair["n"], pair["n_texts"]) == (len(chosen), len(votes))
        assert (pair["n_fixed"], pair["n_broken"]) == (fixed, broken)
        by_row.append(sign_test(fixed, broken))
        by_text.append(sign_test(int((votes > 0).sum()), int((votes < 0).sum())))
        assert math.isclose(pair["mcnemar_p"], by_row[-1], rel_tol=1e-9, abs_tol=1e-300)
        assert math.isclose(pair["mcnemar_p_texts"], by_text[-1], rel_tol=1e-9, abs_tol=1e-300)
        assert pair["accuracy_delta"] == pytest.approx((fixed - broken) / len(chosen), abs=1e-12)
        sums = np.bincount(texts, gained)
        options = {"method": "percentile", "paired": True, "rng": np.random.default_rng(0)}
        interval = bootstrap(
            (sums, n_rows), lambda gains, rows, axis=-1: gains.sum(axis) / rows.sum(axis), vectorized=True, **options
        ).confidence_interval
        assert pair["accuracy_delta_ci95"] == pytest.approx(tuple(interval), abs=0.01)
        rows_of = np.split(np.argsort(texts, kind="stable"), np.cumsum(n_rows)[:-1])

        def macro_f1_delta(drawn: Any, rows_of: Any = rows_of, true: Any = true, given: Any = given) -> Any:
            rows = np.concatenate([rows_of[int(text)] for text in drawn])
            options: Any = {"labels": range(len(number)), "average": "macro", "zero_division": 0}
            first, second = (f1_score(true[rows], ids[rows], **options) for ids in given)
            return first - second

        assert pair["macro_f1_delta"] == pytest.approx(macro_f1_delta(range(len(votes))), abs=1e-9)
        interval = bootstrap(
            (np.arange(len(votes)),), macro_f1_delta, n_resamples=400, vectorized=False, **options
        ).confidence_interval
        assert pair["macro_f1_delta_ci95"] == pytest.approx(tuple(interval), abs=0.01)
        discordance, delta = float(np.mean(votes != 0)), pair["minimum_detectable_difference"]
        z_alpha, z_beta = norm.ppf([0.975, 0.8])
        discordance = max(discordance, delta)  # all of them going one way
        needed = ((z_alpha * discordance**0.5 + z_beta * (discordance - delta**2) ** 0.5) / delta) ** 2
        assert needed == pytest.approx(len(votes))
    p_holm = holm(by_row)
    decided = [max(ps) < 0.05 for ps in zip(p_holm, holm(by_text), strict=True)]
    unproven = {
        pair["candidate"]
        for pair, is_decided in zip(metrics["comparison"], decided, strict=True)
        if pair["baseline"] == "majority" and not (is_decided and pair["n_fixed"] > pair["n_broken"])
    }
    for pair, p, is_decided in zip(metrics["comparison"], p_holm, decided, strict=True):
        assert math.isclose(pair["mcnemar_p_holm"], p, rel_tol=1e-9, abs_tol=1e-300)
        winner = "candidate" if pair["n_fixed"] > pair["n_broken"] else "baseline"
        wins = is_decided and pair[winner] not in unproven
        assert pair["verdict"] == (f"{winner}_wins" if wins else "inconclusive")


def sign_test(fixed: int, broken: int) -> float:
    return float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def holm(p_values: list[float]) -> list[float]:
    order = np.argsort(p_values)
    steps = np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(steps, 1.0)[np.argsort(order)].tolist()


def test_banking77_with_nothing_given_reaches_its_thresholds_and_its_adapter_serves(
    service: httpx.Client, shared_data: Path, tmp_path: Path
) -> None:
    job, metrics, rows = run(service, shared_data / "banking77.csv")
    check_figures(metrics, rows)
    accuracy = {method: scored["test"]["accuracy"] for method, scored in metrics["methods"].items()}
    assert accuracy["tfidf_logreg"] >= 0.88
    assert accuracy["lora"] >= 0.93
    assert accuracy["lora"] >= accuracy["embedding_logreg"]
    check_stock_reload(service, job, rows, tmp_path)


def check_stock_reload(client: httpx.Client, job: dict[str, Any], rows: list[dict[str, str]], folder: Path) -> None:
    """Stock transformers and PEFT in fp32, from the published folder alone, and /predict, in what `auto` gives.

    In fp32 the same labels; in bf16 on at least 99.5 % of the rows.
    """
    import io
    import zipfile

    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from service.ml.base_models import find_base, locate

    archive = client.get(f"/models/{job['model_id']}/download").content
    zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
    labels = json.loads((folder / "manifest.json").read_text())["labels"]
    base = locate(find_base("minilm", None)).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    stock = PeftModel.from_pretrained(model, folder).eval()
    sample = [row for row in rows if row["split"] == "test"][:1000]
    texts = [row["text"] for row in sample]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=192, return_tensors="pt")
    with torch.inference_mode():
        given = [labels[i] for i in stock(**inputs).logits.argmax(1)]
    exact = client.get(f"/jobs/{job['id']}/artifacts/metrics.json").json()["environment"]["scored_in"] == "float32"
    share, within = (1, 1e-4) if exact else (0.995, 0.02)
    assert sum(one == row["lora"] for one, row in zip(given, sample, strict=True)) >= share * len(sample)
    _until(lambda: client.post("/predict", json={"model": job["model_id"], "text": "x"}).status_code == 200, 60)
    served = client.post("/predict", json={"model": job["model_id"], "texts": texts}).json()["predictions"]
    assert sum(answer["label"] == one for answer, one in zip(served, given, strict=True)) >= share * len(sample)
    confidence = [float(row["lora_confidence"]) for row in sample]
    assert [answer["confidence"] for answer in served] == pytest.approx(confidence, abs=within)


@pytest.mark.parametrize("fields", [{}, {"text_column": "1", "label_column": "0", "has_header": "false"}])
def test_sms_spam_as_it_came_reaches_its_threshold(
    service: httpx.Client, shared_data: Path, fields: dict[str, str]
) -> None:
    _job, metrics, rows = run(service, shared_data / "sms_spam.tsv", **fields)
    check_figures(metrics, rows)
    assert metrics["split"]["n_train"] + metrics["split"]["n_validation"] + metrics["split"]["n_test"] == 5574
    assert metrics["methods"]["lora"]["test"]["macro_f1"] >= 0.96
