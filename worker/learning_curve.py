"""How many labels it takes: the trained methods on growing shares of the train rows, on the same test rows."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.core.spec import auto_epochs
from service.ml.split import growing_order
from worker.methods.embedding_logreg import EmbeddingLogreg
from worker.methods.frozen import FrozenBase
from worker.methods.lora import Lora
from worker.methods.protocol import OnProgress, Predictor, Rows
from worker.methods.recipe import LoraRecipe
from worker.methods.tfidf_logreg import TfidfLogreg
from worker.methods.training import OnEvent
from worker.metrics import score
from worker.saved import Saveable, Served

TRAINED = ("tfidf_logreg", "embedding_logreg", "lora")
CAVEAT = (
    "By point estimate on the prompt's rows, with one draw of rows per share: a crossing that more rows or another "
    "seed may move. The comparison of the whole run is the tested one."
)

Serve = Callable[[str, Saveable, Path, str], Served]
"""Saves and loads a fitted method: its name, itself, a folder, the precision it was trained in."""


def main_part(shares: Sequence[float]) -> float:
    """The share of the fine-tuning time that goes to all rows; the rest goes to the smaller shares."""
    return 1 / (1 + sum(share for share in shares if share < 1))


@dataclass
class LearningCurve:
    """Fits methods on the first rows of one order, so that every share holds the ones before it.

    Args:
        shares: Of the train rows, ascending; 1 is the main run itself and is not fitted again.
        methods: Of `TRAINED`.
        base: The frozen base, which computes its states of the train rows once.
        recipe: Of the main fine-tune; None where there is none.
        serve: What a fitted model goes through before it answers, as in the main run.
        train, validation, test: The rows of the main run.
        subset: Positions of the prompts' rows within the test rows.
        seed: Of the order.
        points: One for each share fitted.
    """

    shares: Sequence[float]
    methods: Sequence[str]
    base: FrozenBase
    recipe: LoraRecipe | None
    serve: Serve
    train: Rows
    validation: Rows
    test: Rows
    subset: NDArray[np.int64]
    seed: int
    points: list[dict[str, Any]] = field(default_factory=list)

    def fit(self, folder: Path, on_progress: OnProgress, on_event: OnEvent) -> None:
        """Fits the shares under 1; `folder` holds what is fitted for as long as it takes."""
        order = growing_order(self.train.texts, self.train.label_ids, self.seed)
        smaller = [share for share in self.shares if share < 1]
        whole, done = sum(smaller) * len(self.methods), 0.0
        for share in reversed(smaller):  # the largest first: the base's states of the others are among its own
            chosen = np.sort(order[: max(2, round(share * len(order)))])
            texts = tuple(self.train.texts[i] for i in chosen)
            rows = Rows(texts, self.train.label_ids[chosen], self.train.labels)
            figures = {}
            for method in self.methods:
                name = f"learning curve, {method} on {len(chosen)} rows"
                on_part = _part(on_progress, done / whole, (done + share) / whole, name)
                figures[method] = self._figures(method, rows, folder, on_part)
                done += share
                data = {"method": method, "share": share, "n_train": len(chosen)} | figures[method]
                on_event("metric", f"{name}: accuracy {figures[method]['accuracy']:.4f}", data)
            self.points.insert(0, {"share": share, "n_train": len(chosen), "methods": figures})

    def _figures(self, method: str, rows: Rows, folder: Path, on_progress: OnProgress) -> dict[str, float]:
        on_progress(0.0, "fitting")
        # A folder of its own: the main run must never go on from a smaller share's checkpoint.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            answers = self._fitted(method, rows, Path(own), on_progress).predict(self.test.texts, on_progress)
        labels = self.train.labels.names
        on_test = score(answers, self.test.label_ids, labels)
        return _point(on_test, score(answers.take(self.subset), self.test.label_ids[self.subset], labels))

    def _fitted(self, method: str, rows: Rows, folder: Path, on_progress: OnProgress) -> Predictor:
        if method == "tfidf_logreg":
            return TfidfLogreg().fit(rows, self.validation, on_progress)
        if method == "embedding_logreg":
            probe = EmbeddingLogreg(self.base).fit(rows, self.validation, on_progress)
            return self.serve(method, probe, folder / "model", "fp32")
        assert self.recipe is not None  # `lora` is among the methods only where it is trained
        recipe = self.recipe
        # What `auto` gives for so many rows: the spec of a second attempt no longer says that it was `auto`.
        if recipe.epochs == auto_epochs(len(self.train.texts)):
            recipe = replace(recipe, epochs=auto_epochs(len(rows.texts)))
        lora = Lora(self.base, recipe, folder / "checkpoints", checkpoint_seconds=math.inf)  # nobody goes on from them
        trained = lora.fit(rows, self.validation, on_progress)
        return self.serve(method, trained, folder / "model", recipe.precision)

    def finished(self, methods: Mapping[str, Any]) -> dict[str, Any]:
        """`learning_curve` and `overtakes` of metrics.json: the shares fitted, and the main run's figures for all."""
        curve = list(self.points)
        if 1 in self.shares:
            whole = {name: _point(methods[name]["test"], methods[name]["baseline_subset"]) for name in self.methods}
            curve.append({"share": 1.0, "n_train": len(self.train.texts), "methods": whole})
        return {"learning_curve": curve, "overtakes": overtakes(curve, methods)}


def overtakes(curve: Sequence[Mapping[str, Any]], methods: Mapping[str, Any]) -> dict[str, Any] | None:
    """From how many train rows on the fine-tune has more of the prompt's rows right than the better prompt.

    Where `lora` is not in the curve, the trained method that gets there first. None where no prompt was run, or none
    stays above it up to the largest share. See `CAVEAT`.
    """
    prompts = {name: methods[name]["baseline_subset"] for name in methods if name.endswith("_prompt")}
    if not prompts or not curve:
        return None
    prompt = max(prompts, key=lambda name: prompts[name]["accuracy"])
    asked, names = prompts[prompt]["accuracy"], list(curve[-1]["methods"])
    found = {name: _above(curve, name, asked) for name in (["lora"] if "lora" in names else names)}
    reached = {name: n_train for name, n_train in found.items() if n_train is not None}
    if not reached:
        return None
    method = min(reached, key=lambda name: reached[name])
    return {
        "method": method, "n_train": reached[method], "prompt": prompt, "prompt_accuracy": asked,
        "n": prompts[prompt]["n"], "caveat": CAVEAT,
    }  # fmt: skip


def _above(curve: Sequence[Mapping[str, Any]], method: str, accuracy: float) -> int | None:
    """Train rows of the first share from which on the method stays above an accuracy on the prompt's rows."""
    above = list(takewhile(lambda point: point["methods"][method]["subset_accuracy"] > accuracy, reversed(curve)))
    return above[-1]["n_train"] if above else None


def _point(on_test: Mapping[str, Any], on_subset: Mapping[str, Any]) -> dict[str, float]:
    return {
        "accuracy": on_test["accuracy"], "macro_f1": on_test["macro_f1"], "subset_accuracy": on_subset["accuracy"]
    }  # fmt: skip


def _part(on_progress: OnProgress, start: float, stop: float, name: str) -> OnProgress:
    return lambda share, message: on_progress(start + share * (stop - start), f"{name}: {message}")
