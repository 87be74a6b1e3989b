"""How fast, how good and how large training is: ours against the notebook's recipe and against an expert's `Trainer`.

The references are `notebook.py`'s. Ours are the worker's own steps with default settings. On a CPU, MiniLM and
BANKING77, with `sms_spam.tsv` beside it and the example file. In parts (`--only`), since the quality's takes half an
hour:

- speed: in each round both references and ours, on the same rows. Ours trains two epochs over them; rows per second
  are of its steps alone, all of them, and `…_with_everything` of all that `fit` does (encoding, probe, validation).
  `share_of_matrix_rate`: FLOPs of the tokens computed, forward, backward to the activations and LoRA's own, by the same
  seconds and by the rate of 2048³ products measured in the round.
- quality: a default run for each split seed, in one go the test accuracy, `embedding_logreg`'s on the same rows, and
  the seconds from opening the file (reading, splitting, loading, encoding, probe, training, validation, checkpoints)
  to the first checkpoint whose best state by validation stands at 0.918 on the test rows. The notebook's time, taken
  before each run: its seconds per row x train rows x 4. Then the same difference on small and on other data.
- memory: the notebook's recipe and a default job of one epoch on the whole file, each with its own processes; the
  job's is `python -m worker.run` as a worker starts it, the notebook's reads the file and trains a few steps.

`--device cuda`, or `--shape tiny` on any machine: a Qwen3 of random weights and texts of 16 and of 100 tokens.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from _measures import Measure, parser, ratio, seconds, show, write
from _ours import Case, drawn, few_shot, fit, opened, quality
from _workload import encoder_flops, matrix_rate
from notebook import DATA, EPOCHS, Labelled, fastest_tuned, notebook_seconds, required, tuned_seconds
from service.ml.device import DTYPES
from worker.launch import ENVIRONMENT
from worker.methods.parts import TOKEN_DROPOUT

ROOT = Path(__file__).resolve().parents[1]
TARGET, PER_LABEL, RANK = 0.918, 16, 16
PARTS = ("speed", "quality", "memory")


def labelled(case: Case) -> Labelled:
    rows = case.train
    return Labelled(rows.texts, rows.label_ids.tolist(), len(rows.labels))


def trained_rate(case: Case) -> tuple[float, float]:
    """Rows per second of the steps alone, and of all that a fine-tune does after its base is loaded."""
    done: list[Any] = []
    base = case.frozen()
    whole = seconds(lambda: done.append(fit(case, base)))
    facts = done[0].facts()
    rows = len(case.train.texts) * facts["epochs_run"]
    return rows / facts["train_seconds"], rows / whole


def training_flops(case: Case) -> float:
    """Of an epoch over the train rows, counted on BERT's shapes; what is left out is not counted.

    Left out are the tokens that are dropped and, behind the last attention, all but the first ones. Nothing before
    the first layer's LoRA is trained, so its three input projections need no backward; attention's backward is counted
    as its forward, though it is twice that.
    """
    config: Any = AutoConfig.from_pretrained(case.ready.base.folder)
    h, n_tokens = config.hidden_size, case.tokens()
    n_tokens = n_tokens - TOKEN_DROPOUT * np.where(n_tokens > 3, n_tokens - 2, 0)
    forward = encoder_flops(config, n_tokens) - 2 * 2 * h * config.intermediate_size * float((n_tokens - 1).sum())
    backward = forward - 2 * 3 * h * h * float(n_tokens.sum())
    lora = 3 * 2 * (2 * h * RANK) * 4 * config.num_hidden_layers * float(n_tokens.sum())
    return forward + backward + lora


def speed_measures(data: Path, given: argparse.Namespace) -> tuple[list[Measure], dict[str, Any]]:
    threads, n, steps = torch.get_num_threads(), *((96, 2) if given.quick else (1600, 9))
    case = opened(data, epochs=2, early_stopping_patience=0).sample(n)
    base, rows, flops = case.ready.base.folder, labelled(case), training_flops(case)
    tuned, tried = fastest_tuned(base, rows.first(n // 2))
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(given.rounds):
        steps_alone, with_everything = trained_rate(case)
        taken["ours"].append(steps_alone)
        taken["with_everything"].append(with_everything)
        taken["matrix"].append(matrix_rate(DTYPES[case.precision]))
        torch.set_num_threads(threads)  # whatever ours has set
        taken["notebook"].append(1 / notebook_seconds(base, rows, steps=steps))
        taken["tuned"].append(1 / tuned_seconds(tuned, base, rows))
    share = [flops / len(case.train.texts) * x for x in ratio(taken, "ours", "matrix")]
    measures = [
        Measure("rows_per_second_vs_notebook", ratio(taken, "ours", "notebook"), at_least=30),
        Measure("rows_per_second_vs_tuned_trainer", ratio(taken, "ours", "tuned"), at_least=1.5),
        Measure("share_of_matrix_rate", share, at_least=0.35),
        Measure("with_everything_vs_notebook", ratio(taken, "with_everything", "notebook")),
        Measure("with_everything_vs_tuned_trainer", ratio(taken, "with_everything", "tuned")),
        Measure("rows_per_second", taken["ours"]),
        Measure("rows_per_second_with_everything", taken["with_everything"]),
        Measure("notebook_rows_per_second", taken["notebook"]),
        Measure("tuned_trainer_rows_per_second", taken["tuned"]),
        Measure("matrix_gflops_per_second", [rate / 1e9 for rate in taken["matrix"]]),
    ]
    return measures, {"precision": case.precision, "tuned_trainer": str(tuned), "tuned_trainer_tried": tried}


def quality_measures(data: Path, given: argparse.Namespace, folder: Path) -> list[Measure]:
    taken: dict[str, list[float]] = defaultdict(list)
    short: dict[str, Any] = {"epochs": 2} if given.quick else {}
    files = {
        "banking77": data,
        "sms_spam": data.parent / "sms_spam.tsv",
        "example": ROOT / "examples/support_tickets.csv",
    }
    if given.quick:
        for name, file in files.items():
            files[name] = drawn(opened(required(file)).train, 40, 0, folder / f"{name}.csv", most_labels=4)
    for seed in given.seeds:
        whole = opened(files["banking77"], seed=seed, **short)
        of_a_row = notebook_seconds(whole.ready.base.folder, labelled(whole), steps=2 if given.quick else 9)
        notebook = of_a_row * len(whole.train.texts) * EPOCHS
        found = quality(partial(opened, files["banking77"], seed=seed, **short), TARGET)
        taken["time"].append(notebook / found.reached)
        taken["seconds"].append(found.seconds)
        taken["seconds_to_0.918"].append(found.reached)
        taken["accuracy"].append(found.lora)
        taken["over"].append(found.lora - found.probe)
        few = quality(partial(few_shot, whole, PER_LABEL, seed, folder))
        taken["few"].append(few.lora - few.probe)
        for name in ("sms_spam", "example"):
            other = quality(partial(opened, required(files[name]), seed=seed, **short))
            taken[name].append(other.lora - other.probe)
            taken[f"{name}_accuracy"].append(other.lora)
        print(f"split seed {seed}:", {name: round(values[-1], 4) for name, values in taken.items()}, flush=True)
    in_time = [x for x in taken["seconds_to_0.918"] if math.isfinite(x)]
    # Of accuracies the mean counts, of times the median.
    return [
        Measure("time_to_quality_vs_notebook", taken["time"], at_least=100),
        _mean("test_accuracy", taken["accuracy"], 0.938),
        _mean("accuracy_over_probe", taken["over"], 0.005),
        _mean("over_probe_16_per_label", taken["few"], -0.003),
        _mean("over_probe_sms_spam", taken["sms_spam"], -0.003),
        _mean("over_probe_example", taken["example"], -0.003),
        _mean("sms_spam_accuracy", taken["sms_spam_accuracy"]),
        _mean("example_accuracy", taken["example_accuracy"]),
        *([Measure("seconds_to_0.918", in_time)] if in_time else []),  # a run that never stood there counts as 0 above
        Measure("seconds_of_a_run", taken["seconds"]),
    ]


def _mean(name: str, values: list[float], at_least: float | None = None) -> Measure:
    return Mean(name, values, at_least)


class Mean(Measure):
    """Judged by its mean over the split seeds."""

    @property
    def value(self) -> float:
        return statistics.fmean(self.values)


def memory_measures(data: Path, given: argparse.Namespace, folder: Path) -> list[Measure]:
    """Each in a process of its own, started by one without torch."""
    if given.quick:
        data = drawn(opened(data).train, 40, 0, folder / "memory.csv", most_labels=4)
    notebook = [str(ROOT / "benchmarks/notebook.py"), "--only", "notebook", "--rounds", "1", "--data", str(data)]
    taken: dict[str, list[float]] = defaultdict(list)
    for number in range(1 if given.quick else 3):
        job = folder / f"job-{number}"
        job.mkdir()
        shutil.copy(data, job / "dataset")
        (job / "job.json").write_text(json.dumps({"spec": {"kind": "train", "train": {"epochs": 1}}}))
        taken["notebook"].append(_peak([*notebook, *["--quick"][: given.quick]], folder))
        taken["ours"].append(_peak(["-P", "-m", "worker.run", str(job)], folder, ENVIRONMENT))
    return [
        Measure("peak_memory_vs_notebook", ratio(taken, "ours", "notebook"), at_most=1.0),
        Measure("peak_memory_bytes", taken["ours"]),
        Measure("notebook_peak_memory_bytes", taken["notebook"]),
    ]


def _peak(arguments: list[str], folder: Path, environment: Mapping[str, str] = MappingProxyType({})) -> float:
    """Bytes, of a Python program and its children at their largest together."""
    command = [sys.executable, str(ROOT / "benchmarks/_peak.py"), str(folder / "peak"), sys.executable, *arguments]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    return float((folder / "peak").read_text())


def qwen3_measures(given: argparse.Namespace, folder: Path) -> tuple[str, list[Measure], dict[str, Any]]:
    """Title, measures, and what is to be known of the machine."""
    from _random_qwen3 import NAME, save_random_qwen3, write_texts

    device, tiny = given.device, given.shape == "tiny"
    shape = given.shape or "0.6b"
    base = save_random_qwen3(folder / "models", shape, device)
    measures: list[Measure] = []
    asked: dict[str, Any] = {"device": device, "base_model": NAME, "models_dir": folder / "models"}
    precision = ""
    for n_tokens, at_least, n in ((16, 8, 6400), (100, 2, 1600)):
        file = write_texts(folder / f"{n_tokens}.csv", 240 if tiny else n // 4 if given.quick else n, n_tokens)
        case, taken = opened(file, epochs=2, early_stopping_patience=0, **asked), defaultdict[str, list[float]](list)
        precision = case.precision
        for _ in range(given.rounds):
            steps_alone, with_everything = trained_rate(case)
            taken["ours"].append(steps_alone)
            taken["with_everything"].append(with_everything)
            steps = 2 if tiny else 20
            taken["notebook"].append(1 / notebook_seconds(base, labelled(case), steps=steps, device=device))
        measures += [
            Measure(f"rows_per_second_vs_notebook_{n_tokens}", ratio(taken, "ours", "notebook"), at_least=at_least),
            *(Measure(f"{name}_rows_per_second_{n_tokens}", values) for name, values in taken.items()),
        ]
    file = write_texts(folder / "192.csv", 160 if tiny else 640, 192)
    case = opened(file, epochs=1, batch_size=64, max_length=192, gradient_checkpointing=True, **asked)
    measures.append(Measure("peak_memory_bytes_64x192", [_device_peak(case)], at_most=10e9))
    name = torch.cuda.get_device_name(device) if device == "cuda" else "cpu"
    title = f"Qwen3 {shape} of random weights, {precision}, {name}; texts of 16 and of 100 tokens"
    return title, measures, {"device": name, "precision": precision, "shape": shape}


def _device_peak(case: Case) -> float:
    """Of a fine-tune with the base that gives its probe beside it, in bytes of the device's memory."""
    if case.device.type != "cuda":
        return float(fit(case, case.frozen()).facts()["peak_memory_bytes"])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(case.device)
    fit(case, case.frozen())
    return float(torch.cuda.max_memory_allocated(case.device))


def arguments() -> argparse.Namespace:
    asked = parser(__doc__)
    asked.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    asked.add_argument("--shape", choices=("0.6b", "tiny"), help="of a Qwen3; by default 0.6b with CUDA, none without")
    asked.add_argument("--data", type=Path, default=DATA, help="texts and labels; by default BANKING77")
    asked.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    asked.add_argument("--rounds", type=int, help="of the speed")
    asked.add_argument("--seeds", type=int, nargs="+", help="of the split, for the quality; by default 42 43 44")
    given = asked.parse_args()
    given.rounds = given.rounds or (1 if given.quick else 5)
    given.seeds = given.seeds or ([42] if given.quick else [42, 43, 44])
    return given


def on_cpu(given: argparse.Namespace, folder: Path) -> tuple[str, list[Measure], dict[str, Any]]:
    """Title, measures, and what is to be known of the machine."""
    data, threads = required(given.data), torch.get_num_threads()
    measures: list[Measure] = []
    known: dict[str, Any] = {"device": "cpu", "threads": threads}
    if "speed" in given.only:
        measures, more = speed_measures(data, given)
        known |= more
        print("The expert's settings, rows/s:", more["tuned_trainer_tried"], "taken:", more["tuned_trainer"])
    if "quality" in given.only:
        measures += quality_measures(data, given, folder)
    if "memory" in given.only:
        measures += memory_measures(data, given, folder)
    return f"MiniLM, {data.stem}, {threads} threads", measures, known


def main() -> None:
    given = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="tuneproof-bench-") as name:
        on_qwen3 = given.device == "cuda" or given.shape
        title, measures, known = (qwen3_measures if on_qwen3 else on_cpu)(given, Path(name))
    show(title, measures)
    write(given.json, measures, **known)


if __name__ == "__main__":
    main()
