"""Training as a job does it, by the worker's own steps: prepare, frozen base, fine-tune.

Stands on the ML floor alone: pydantic is stood in for where it is missing.
"""

import csv
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import _floor

_floor.stand_in()

from service.core.spec import JobSpec, TrainSpec  # noqa: E402 -- behind the stand-in
from service.ml.backbone import load_backbone  # noqa: E402
from service.ml.dataset import UploadOptions, profile  # noqa: E402
from service.ml.device import DTYPES, serving_precision  # noqa: E402
from service.ml.encode import token_counts  # noqa: E402
from service.ml.engine import Engine  # noqa: E402
from worker.methods.checkpoint import Checkpoint  # noqa: E402
from worker.methods.embedding_logreg import EmbeddingLogreg  # noqa: E402
from worker.methods.frozen import FrozenBase  # noqa: E402
from worker.methods.lora import Lora, Trained  # noqa: E402
from worker.methods.protocol import Rows  # noqa: E402
from worker.methods.recipe import LoraRecipe  # noqa: E402
from worker.prepare import Prepared, prepare  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A file as a job finds it: every `auto` of its spec resolved, its rows in their parts."""

    ready: Prepared
    device: torch.device
    train: Rows
    validation: Rows
    test: Rows

    @property
    def precision(self) -> str:
        return str(self.ready.spec.train.precision)

    def frozen(self) -> FrozenBase:
        """The base as a job loads it, nothing computed yet."""
        dtype = DTYPES[serving_precision(self.device)]
        return FrozenBase(
            Engine(load_backbone(self.ready.base, device=self.device, dtype=dtype)), self.ready.spec.train.max_length
        )

    def sample(self, n: int) -> "Case":
        """On `n` train rows by chance, and an eighth as many to choose on."""
        return replace(self, train=_sample(self.train, n), validation=_sample(self.validation, max(n // 8, 16)))

    def tokens(self) -> Any:
        """`(N,)` of the train rows, cut as training cuts them."""
        tokenizer = self.frozen().engine.backbone.tokenizer
        return np.minimum(token_counts(tokenizer, self.train.texts), self.ready.spec.train.max_length)


def _sample(rows: Rows, n: int) -> Rows:
    chosen = np.random.default_rng(0).permutation(len(rows.texts))[:n]
    return Rows(tuple(rows.texts[i] for i in chosen), rows.label_ids[chosen], rows.labels)


def opened(
    file: Path, *, seed: int = 42, device: str = "cpu", base_model: str = "auto", models_dir: Path | None = None,
    **train: Any,
) -> Case:  # fmt: skip
    """The defaults' case of a file, but for what of `train` is given."""
    spec = JobSpec(kind="train", seed=seed, base_model=base_model, train=TrainSpec(**train))
    table_format = profile(file, UploadOptions()).format
    ready = prepare(spec, file, table_format, models_dir, torch.device(device), lambda _message, _level: None)
    parts = (
        Rows(tuple(ready.table.texts[i] for i in part), ready.table.label_ids[part], ready.table.labels)
        for part in (ready.split.train, ready.split.validation, ready.split.test)
    )
    return Case(ready, torch.device(device), *parts)


def fit(case: Case, base: FrozenBase, on_checkpoint: Callable[[Path], None] = lambda _path: None) -> Trained:
    recipe = LoraRecipe.of(case.ready.spec.train, case.ready.spec.seed)
    with tempfile.TemporaryDirectory(prefix="tuneproof-bench-") as folder:
        return Lora(base, recipe, Path(folder), on_checkpoint).fit(case.train, case.validation)


@dataclass(frozen=True)
class Quality:
    """What a default job on a file came to.

    Args:
        lora: Test accuracy of the state that validation chose.
        probe: `embedding_logreg`'s, on the same rows.
        reached: Seconds from opening the file to a state on disk that stood at the target; infinite where none did.
        seconds: To the end of the fine-tune.
    """

    lora: float
    probe: float
    reached: float
    seconds: float


def quality(open_case: Callable[[], Case], target: float = 1.0) -> Quality:
    """Runs a fine-tune to its end, and looks at the test rows whenever a checkpoint was written.

    What a checkpoint holds as the best by validation is set aside and judged when all is over; setting aside is not
    counted. The first holds the state before the first step.
    """
    with tempfile.TemporaryDirectory(prefix="tuneproof-bench-") as kept:
        written: list[tuple[float, Path]] = []
        start, aside = time.perf_counter(), 0.0

        def keep(path: Path) -> None:
            nonlocal aside
            at = time.perf_counter()
            written.append((at - start - aside, Path(kept, str(len(written)))))
            shutil.copytree(path, written[-1][1])
            aside += time.perf_counter() - at

        case = open_case()
        base = case.frozen()
        trained = fit(case, base, keep)
        seconds = time.perf_counter() - start - aside
        lora = _accuracy(trained.logits(case.test.texts), case.test)
        reached = seconds if lora >= target else float("inf")
        for at, path in written:
            if at >= reached:
                break
            trained.weights = Checkpoint.load(path).best
            if _accuracy(trained.logits(case.test.texts), case.test) >= target:
                reached = at
    probe = EmbeddingLogreg(base).fit(case.train, case.validation)
    return Quality(lora, _accuracy(probe.logits(case.test.texts), case.test), reached, seconds)


def _accuracy(logits: Any, rows: Rows) -> float:
    return float((logits.argmax(1) == rows.label_ids).mean())


def write_csv(file: Path, texts: Sequence[str], labels: Sequence[str]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return file


def drawn(rows: Rows, per_label: int, seed: int, file: Path, most_labels: int | None = None) -> Path:
    """So many rows of each label by chance, as a file of their own."""
    order = np.random.default_rng(seed).permutation(len(rows.texts))
    names = rows.labels.names
    chosen = [i for k in range(len(names))[:most_labels] for i in order[rows.label_ids[order] == k][:per_label]]
    return write_csv(file, [rows.texts[i] for i in chosen], [names[rows.label_ids[i]] for i in chosen])


def few_shot(whole: Case, per_label: int, seed: int, folder: Path) -> Case:
    """A user's small file: `per_label` rows a label to train on, an eighth of it to choose on; judged on all test rows.

    Twenty rows of each label are drawn for sixteen: the split takes its tenth to choose on, and the tenth that it
    would judge on is left for the whole file's test rows, of which none can be in it.
    """
    drawn(whole.train, round(per_label / 0.8), seed, folder / f"{seed}.csv")
    case = opened(folder / f"{seed}.csv", seed=seed)
    names = [whole.test.labels.names[i] for i in whole.test.label_ids]
    return replace(case, test=Rows(whole.test.texts, case.train.labels.ids(names), case.train.labels))
