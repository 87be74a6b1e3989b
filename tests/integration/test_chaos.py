"""Training that is killed at random moments, stopped, or simply done twice: the result is the same, to the byte."""

import csv
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import BERT, labelled_texts
from tests.waiting import until

# A server that has imported torch once; each attempt is a fork of it, a process of its own that can be killed.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["worker.run", "peft", "sklearn.linear_model", "transformers.models.bert.modeling_bert"])
MOMENTS = np.random.default_rng(20).uniform(size=20)
SPEC = {
    "base_model": BERT, "seed": 3, "baseline": {"methods": ["majority", "embedding_logreg"], "sample_size": 20},
    "train": {"epochs": 6, "batch_size": 8, "max_length": 24, "learning_rate": 3e-3, "early_stopping_patience": 0},
}  # fmt: skip


def attempt(folder: str) -> None:
    import torch

    from worker.run import main

    torch.set_num_threads(1)
    os._exit(main([folder]))


def make_job(folder: Path, models_dir: Path) -> Path:
    folder.mkdir()
    texts, labels = labelled_texts(240, seed=5)
    with (folder / "dataset").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    job = {"spec": SPEC, "models_dir": str(models_dir), "serve_dtype": "fp32", "checkpoint_seconds": 0.05}
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def start(folder: Path) -> Any:
    child = FORKS.Process(target=attempt, args=(str(folder),))
    child.start()
    return child


def finished(folder: Path) -> float:
    """Runs what is left of a job to its end; gives its seconds."""
    begun = time.monotonic()
    child = start(folder)
    child.join(120)
    assert child.exitcode == 0
    return time.monotonic() - begun


def result(folder: Path) -> dict[str, bytes]:
    """The answers and both models, with everything that is to serve them."""
    files = [
        folder / "out" / "predictions.csv",
        *(folder / "out" / "adapter").rglob("*"),
        *(folder / "models").rglob("*"),
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> tuple[float, dict[str, bytes]]:
    place = tmp_path_factory.mktemp("undisturbed")
    finished(make_job(place / "warm", tiny_models))
    folder = make_job(place / "job", tiny_models)
    seconds = finished(folder)
    found = result(folder)
    assert {"out/predictions.csv", "out/adapter/adapter_model.safetensors", "out/adapter/manifest.json"} <= found.keys()
    assert found == result(place / "warm"), "the same job twice is the same to the byte"
    return seconds, found


@pytest.mark.parametrize("moment", [*MOMENTS[:3], *(pytest.param(m, marks=pytest.mark.chaos) for m in MOMENTS[3:])])
def test_a_run_killed_at_a_random_moment_ends_as_the_undisturbed_one(
    undisturbed: tuple[float, dict[str, bytes]], tmp_path: Path, tiny_models: Path, moment: float
) -> None:
    seconds, expected = undisturbed
    folder = make_job(tmp_path / "job", tiny_models)
    child = start(folder)
    child.join(seconds * float(moment))
    child.kill()
    child.join(20)
    assert child.exitcode in (-signal.SIGKILL, 0)
    finished(folder)
    assert result(folder) == expected


def test_a_run_told_to_stop_leaves_a_checkpoint_of_the_last_step_and_goes_on_from_it(
    undisturbed: tuple[float, dict[str, bytes]], tmp_path: Path, tiny_models: Path
) -> None:
    folder = make_job(tmp_path / "job", tiny_models)
    child = start(folder)
    checkpoints = folder / "checkpoints"
    until(lambda: any(checkpoints.glob("step-*/state.json")), 60, "it trains")
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 75
    states = [json.loads(file.read_text()) for file in checkpoints.glob("step-*/state.json")]
    assert max(state["epoch"] * 24 + state["step"] for state in states) > 0
    finished(folder)
    assert result(folder) == undisturbed[1]
    log = [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log if "validation_macro_f1" in line] == [0, 1, 2, 3, 4, 5, 6]
    assert all(line["tokens_per_second"] > 0 for line in log if "learning_rate" in line)
