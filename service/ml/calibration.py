"""From logits to confidences, and from confidences to a threshold that was right often enough."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
FEW_ROWS = 30


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities over the last axis, in float64, so that they sum to 1 in every digit that is printed.

    The one place where logits become probabilities, in scoring and in serving. A temperature changes no order, so no
    label. Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    exp = np.exp((logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)) / temperature)
    probabilities: NDArray[np.float64] = exp / exp.sum(axis=-1, keepdims=True)
    return probabilities


@dataclass(frozen=True)
class Threshold:
    """A confidence to abstain under, and what it did on the validation rows.

    Args:
        min_confidence: None where no confidence reached the precision asked for.
        validation_precision: Share right of the rows at or above it; None with it.
        validation_precision_ci95: Wilson's interval, wide where few rows were kept. None with it.
        validation_coverage: Share of the rows at or above it.
        validation_rows: All of them.
        note: Why there is no threshold, or why not to rely on it.
    """

    min_confidence: float | None
    validation_precision: float | None
    validation_precision_ci95: tuple[float, float] | None
    validation_coverage: float
    validation_rows: int
    note: str | None = None


def threshold_for(target_precision: float, calibration: Mapping[str, Any]) -> Threshold:
    """The lowest confidence whose validation rows, at it or above it, were right as often as asked.

    Args:
        target_precision: Share right.
        calibration: A manifest's: `rows`, and `points` of `[min_confidence, rows kept, rows right]`, each lower than
            the next in confidence and in share right.
    """
    rows = calibration["rows"]
    for min_confidence, kept, right in calibration["points"]:
        if right / kept >= target_precision:
            few = (
                f"Only {kept} of {rows} validation rows were that sure, too few to rely on."
                if kept < FEW_ROWS
                else None
            )
            return Threshold(min_confidence, right / kept, wilson_interval(right, kept), kept / rows, rows, few)
    least, kept, right = calibration["points"][-1]
    return Threshold(
        None, None, None, 0.0, rows,
        f"No confidence reached a precision of {target_precision:g} on the {rows} validation rows; the best was "
        f"{right / kept:.3f}, on the {kept} rows at {least:.3f} or above. Every prediction abstains.",
    )  # fmt: skip


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, `right` of `n`. Source: Wilson 1927."""
    share, spread = right / n, Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
