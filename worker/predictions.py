"""What every method answers with."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.ml.calibration import softmax

NO_ANSWER = -1

Outcome = Literal["valid", "invalid", "ambiguous", "empty"]


@dataclass(frozen=True)
class Spent:
    """What a remote model's answers took.

    Args:
        prompt_tokens: As the endpoint counts them; null, as the next two are, where it left one answer uncounted.
        completion_tokens: Of the answers.
        cost: At the endpoint's prices, in their currency.
        latency_p50_seconds: From asking to the answer, retries included: the median.
        latency_p95_seconds: One in twenty took longer.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None
    latency_p50_seconds: float
    latency_p95_seconds: float


@dataclass(frozen=True)
class Predictions:
    """One method's answers for N rows and K labels.

    Args:
        label_ids: `(N,)`, the predicted label's id, or `NO_ANSWER`.
        probabilities: `(N, K)` float64, rows sum to 1; None where the method has none.
        raw: N generated texts, as they came; None where nothing is generated.
        outcomes: N outcomes of parsing `raw`; None where nothing is generated.
        seconds_per_row: Wall time of predicting, per row.
        temperature: The one fitted on validation rows, under which the probabilities are; None where none was.
        spent: What it took where another machine did the work.
    """

    label_ids: NDArray[np.int64]
    probabilities: NDArray[np.float64] | None = None
    raw: tuple[str, ...] | None = None
    outcomes: tuple[Outcome, ...] | None = None
    seconds_per_row: float = 0.0
    temperature: float | None = None
    spent: Spent | None = None

    @classmethod
    def of_logits(cls, logits: NDArray[np.floating], temperature: float, seconds_per_row: float) -> "Predictions":
        """The most probable labels. Shape: `(N, K)`."""
        probabilities = softmax(logits, temperature)
        ids = probabilities.argmax(1)
        return cls(ids, probabilities, seconds_per_row=seconds_per_row, temperature=temperature)

    def take(self, rows: NDArray[np.int64]) -> "Predictions":
        """The answers at positions `rows`, in that order."""
        return Predictions(
            self.label_ids[rows],
            None if self.probabilities is None else self.probabilities[rows],
            None if self.raw is None else tuple(self.raw[i] for i in rows),
            None if self.outcomes is None else tuple(self.outcomes[i] for i in rows),
            self.seconds_per_row,
            self.temperature,
        )
