"""What one method's answers are worth on some rows: the figures of `metrics.json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.ml.calibration import softmax
from worker.calibration import coverage_curve, expected_calibration_error, reliability_bins
from worker.predictions import NO_ANSWER, Predictions

# A true label given probability 0 would cost infinitely much; scikit-learn's log_loss uses the same floor.
PROBABILITY_FLOOR = float(np.finfo(np.float64).eps)


def score(predictions: Predictions, true_ids: NDArray[np.int64], labels: Sequence[str]) -> dict[str, Any]:
    """The figures of one method on N rows, as `metrics.json` holds them: plain JSON types, never NaN.

    Macro-F1 is the mean over all K labels of the dataset. A label that was never predicted, or that has no row
    here, counts as 0: scikit-learn's `f1_score(labels=range(K), zero_division=0)`. No answer is a wrong answer.
    A mean over no rows is null.

    Args:
        predictions: Answers for the N rows.
        true_ids: `(N,)` label ids, 0 to K-1.
        labels: The K labels, in the order of their ids.

    Raises:
        ValueError: the answers and the rows differ in number, or an id is no label.
    """
    K, predicted_ids = len(labels), predictions.label_ids
    if predicted_ids.shape != true_ids.shape:
        raise ValueError(f"{len(true_ids)} rows need as many answers, found {len(predicted_ids)}")
    if not (np.isin(true_ids, np.arange(K)).all() and np.isin(predicted_ids, np.arange(NO_ANSWER, K)).all()):
        raise ValueError(f"label ids must be 0 to {K - 1}, or {NO_ANSWER} for no answer")

    correct = predicted_ids == true_ids
    matrix = confusion_matrix(predicted_ids, true_ids, K)
    hits, support, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix[:, :K].sum(axis=0)
    precision, recall, f1 = _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, support + predicted)
    per_label = zip(labels, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    figures: dict[str, Any] = {
        "n": len(true_ids),
        "accuracy": _mean(correct),
        "macro_f1": float(f1.mean()) if len(true_ids) else None,
        "weighted_f1": _mean(f1[true_ids]),
        "per_label": {label: {"precision": p, "recall": r, "f1": f, "support": s} for label, p, r, f, s in per_label},
        "confusion_matrix": matrix.tolist(),
        "seconds_per_row": float(predictions.seconds_per_row),
    }
    if predictions.probabilities is not None:
        figures |= _calibration(predictions.probabilities, predicted_ids, true_ids)
        confidence = np.nan_to_num(confidences(predictions.probabilities, predicted_ids))
        figures["coverage"] = coverage_curve(confidence, correct)
        if (temperature := predictions.temperature) is not None:
            with np.errstate(divide="ignore"):  # ln p is a logit over the temperature: this takes the division back
                before = softmax(np.log(predictions.probabilities), 1 / temperature)
            uncalibrated = _calibration(before, predicted_ids, true_ids)
            figures |= {
                f"{name}_uncalibrated": uncalibrated[name] for name in ("log_loss", "expected_calibration_error")
            }
            figures["temperature"] = temperature
    if predictions.spent is not None:
        figures |= asdict(predictions.spent)
    if predictions.outcomes is not None:
        figures |= _parsing(np.array(predictions.outcomes, dtype=str), correct)
    return figures


def confusion_matrix(predicted_ids: NDArray[np.int64], true_ids: NDArray[np.int64], K: int) -> NDArray[np.int64]:
    """`(K, K+1)` counts, `[true][predicted]`; the last column is "no answer"."""
    columns = np.where(predicted_ids == NO_ANSWER, K, predicted_ids)
    return np.bincount(true_ids * (K + 1) + columns, minlength=K * (K + 1)).reshape(K, K + 1)


def label_probabilities(probabilities: NDArray[np.float64], label_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """`(N,)`, the probability each row gives to one label. Shapes: `(N, K)`, `(N,)`."""
    return probabilities[np.arange(len(label_ids)), label_ids]


def confidences(probabilities: NDArray[np.float64], predicted_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """`(N,)`, the probability of the label each row was given; NaN where none was. Shapes: `(N, K)`, `(N,)`."""
    return np.where(predicted_ids == NO_ANSWER, np.nan, label_probabilities(probabilities, predicted_ids))


def log_loss(probability_of_true: NDArray[np.float64]) -> float | None:
    """−mean(ln p) over `(N,)` probabilities of the true labels, each taken as at least `PROBABILITY_FLOOR`."""
    return _mean(-np.log(np.maximum(probability_of_true, PROBABILITY_FLOOR)))


def _calibration(
    probabilities: NDArray[np.float64], predicted_ids: NDArray[np.int64], true_ids: NDArray[np.int64]
) -> dict[str, Any]:
    """How good the probabilities are. Rows without an answer have no confidence and stand in no bin."""
    answered = predicted_ids != NO_ANSWER
    confidence = confidences(probabilities, predicted_ids)[answered]
    bins = reliability_bins(confidence, (predicted_ids == true_ids)[answered])
    return {
        "log_loss": log_loss(label_probabilities(probabilities, true_ids)),
        "expected_calibration_error": expected_calibration_error(bins),
        "calibration": {"bins": bins},
    }


def _parsing(outcomes: NDArray[np.str_], correct: NDArray[np.bool_]) -> dict[str, Any]:
    """How generated answers parsed. accuracy = accuracy_on_valid · (1 − invalid_rate): invalid is all but valid."""
    valid = outcomes == "valid"
    counts = {f"n_{outcome}": int((outcomes == outcome).sum()) for outcome in ("invalid", "ambiguous", "empty")}
    return counts | {"invalid_rate": _mean(~valid), "accuracy_on_valid": _mean(correct[valid])}


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return part / np.maximum(whole, 1)


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
