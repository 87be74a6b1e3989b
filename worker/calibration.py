"""Whether confidences mean what they say: a temperature fitted on the validation rows, and the curves that show it.

The reasons are in docs/decisions/0010.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEMPERATURES = (0.05, 20.0)
CALIBRATION_BINS = 10
COVERAGE_POINTS = 20
MAX_THRESHOLDS = 100


def fit_temperature(logits: NDArray[np.floating], label_ids: NDArray[np.int64]) -> float:
    """The temperature under which the logits' log loss on N rows is lowest; 1 where none is better than that.

    The true label counts 1 − ε and all others together ε = 1/(N+2): without that, N rows that are all right would ask
    for certainty. With it they ask for the (N+1)/(N+2) that the rule of succession gives. ε vanishes with N.

    Args:
        logits: `(N, K)`, finite.
        label_ids: `(N,)`.

    Returns:
        Within `TEMPERATURES`; finite, whatever the rows.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2; the targets are those of Platt 1999, section 2.2.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    n, rows = len(label_ids), np.arange(len(label_ids))
    if n == 0:
        return 1.0
    doubt = 1 / (n + 2)
    all_logits = logits.astype(np.float64)
    of_true = all_logits[rows, label_ids]
    of_others = all_logits.copy()
    of_others[rows, label_ids] = -np.inf

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        total = logsumexp(all_logits * scale, axis=1)
        log_p, log_rest = of_true * scale - total, logsumexp(of_others * scale, axis=1) - total
        return -float(np.mean((1 - doubt) * log_p + doubt * log_rest))

    low, high = map(math.log, TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x)) if found.fun < loss(0.0) else 1.0


def precision_points(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[list[float]]:
    """`[min_confidence, rows kept, rows right]` for every confidence at which the share right is higher than at all
    lower ones: what `threshold_for` looks in. The first keeps all rows, at 0. At most `MAX_THRESHOLDS`, evenly thinned.

    Args:
        confidence: `(N,)`, N at least 1.
        correct: `(N,)`.
    """
    order = np.argsort(-confidence, kind="stable")
    descending, right = confidence[order], np.cumsum(correct[order])
    ends = np.flatnonzero(np.append(descending[1:] < descending[:-1], True))[::-1]  # last row of each confidence
    shares = right[ends] / (ends + 1)
    records = ends[np.append(True, shares[1:] > np.maximum.accumulate(shares)[:-1])]
    points = [[float(descending[i]) if i < len(correct) - 1 else 0.0, int(i + 1), int(right[i])] for i in records]
    kept = np.linspace(0, len(points) - 1, min(len(points), MAX_THRESHOLDS)).round().astype(int)
    return [points[i] for i in kept]


def reliability_bins(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Ten equal bins of confidence, (0, 0.1], …, (0.9, 1]: rows, mean confidence and share right; null where empty."""
    number = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    bins = []
    for i in range(CALIBRATION_BINS):
        inside = number == i
        n = int(inside.sum())
        bins.append({
            "low": i / CALIBRATION_BINS, "high": (i + 1) / CALIBRATION_BINS, "n": n,
            "mean_confidence": float(confidence[inside].mean()) if n else None,
            "accuracy": float(correct[inside].mean()) if n else None,
        })  # fmt: skip
    return bins


def expected_calibration_error(bins: list[dict[str, Any]]) -> float | None:
    """How far confidence is from the share of right answers: the mean over rows of their bin's gap. Null of no rows.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    n = sum(b["n"] for b in bins)
    return sum(b["n"] * abs(b["accuracy"] - b["mean_confidence"]) for b in bins if b["n"]) / n if n else None


def coverage_curve(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[dict[str, float]]:
    """The share of rows answered at a threshold, and the share right of those: the surest twentieth first, all last."""
    descending, n = np.sort(confidence)[::-1], len(confidence)
    positions = {-(-n * i // COVERAGE_POINTS) - 1 for i in range(1, COVERAGE_POINTS + 1)} if n else set()
    thresholds = sorted({float(descending[position]) for position in positions}, reverse=True)
    answered = [confidence >= threshold for threshold in thresholds]
    return [
        {"threshold": threshold, "coverage": float(kept.mean()), "accuracy": float(correct[kept].mean())}
        for threshold, kept in zip(thresholds, answered, strict=True)
    ]
