"""About how long each method will take, before anything has run. Rough: right to a factor of two or so.

Only the tokens to read, the rows and the labels count; loading models and writing files come on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.core.spec import BaselineSpec, auto_epochs
from service.ml.base_models import EMBEDDED
from service.ml.split import Part

TWO_CORES = "two-core CPU"
# scikit-learn's logistic regressions on BANKING77 (77 labels, 17 tokens or 58 characters a text), on two cores.
_TFIDF_SECONDS, _TFIDF_PER_CHAR_AND_LABEL = 2.0, 4e-7
_PROBE_SECONDS, _PROBE_PER_ROW_AND_LABEL = 2.0, 1.5e-5


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Args:
        rows: By part.
        tokens: By part, cut to `max_length`; None where nobody could count them.
        train_chars: Of the train part.
        n_labels: Of the dataset.
    """

    rows: Mapping[Part, int]
    tokens: Mapping[Part, int] | None
    train_chars: int
    n_labels: int


@dataclass(frozen=True)
class Speed:
    """How fast a base model is here.

    Args:
        train_tokens_per_second: Of a LoRA step.
        read_tokens_per_second: Of the frozen base.
        prompt_seconds_per_row: Of a prompted model.
        basis: Where that is known from: a job's id, or `TWO_CORES`.
    """

    train_tokens_per_second: float
    read_tokens_per_second: float
    prompt_seconds_per_row: float | None
    basis: str


@dataclass(frozen=True)
class Estimate:
    """Both None where nothing is known: no job has finished here on that base model."""

    seconds: float | None
    basis: str | None


KNOWN = {EMBEDDED: Speed(2_300, 5_000, None, TWO_CORES)}


def measured_speed(metrics: Mapping[str, Any], job_id: str) -> Speed | None:
    """What the metrics.json of a finished job tells; None where it did not train, or not for long enough."""
    training, methods = metrics.get("training") or {}, metrics.get("methods") or {}
    trained_tokens = training.get("tokens_per_second", 0) * training.get("train_seconds", 0)
    seconds_per_row = methods.get("lora", {}).get("test", {}).get("seconds_per_row", 0)
    if not trained_tokens or not seconds_per_row:
        return None
    tokens_per_row = trained_tokens / (training["epochs_run"] * metrics["split"]["n_train"])
    prompted = methods.get("zero_shot_prompt", {}).get("baseline_subset", {}).get("seconds_per_row")
    return Speed(training["tokens_per_second"], tokens_per_row / seconds_per_row, prompted, job_id)


def estimates(work: Work, speed: Speed | None) -> dict[str, Estimate]:
    """Seconds of every method with its defaults; epochs that stop early are not foreseen."""
    rows, tokens = work.rows, work.tokens
    n_fitted = work.n_labels if work.n_labels > 2 else 1  # two labels are told apart by one row of weights
    found = dict.fromkeys(
        ("majority", "tfidf_logreg", "embedding_logreg", "zero_shot_similarity", "zero_shot_prompt", "lora"),
        Estimate(None, None),
    )
    found["majority"] = Estimate(0.0, TWO_CORES)
    tfidf_seconds = _TFIDF_SECONDS + _TFIDF_PER_CHAR_AND_LABEL * work.train_chars * n_fitted
    found["tfidf_logreg"] = Estimate(round(tfidf_seconds, 1), TWO_CORES)
    if speed is None or tokens is None:
        return found

    def add(method: str, seconds: float) -> None:
        found[method] = Estimate(round(seconds, 1), speed.basis)

    def read(*parts: Part) -> float:
        return sum(tokens[part] for part in parts) / speed.read_tokens_per_second

    probe = _PROBE_SECONDS + _PROBE_PER_ROW_AND_LABEL * min(rows["train"], 50_000) * n_fitted
    epoch = tokens["train"] / speed.train_tokens_per_second + read("validation")
    add("zero_shot_similarity", read("validation", "test"))
    add("embedding_logreg", read("train", "validation", "test") + probe)
    add("lora", read("train", "validation", "test") + probe + auto_epochs(rows["train"]) * epoch)
    if speed.prompt_seconds_per_row is not None:
        n_prompted = min(rows["test"], BaselineSpec().sample_size)
        add("zero_shot_prompt", n_prompted * speed.prompt_seconds_per_row)
    return found
