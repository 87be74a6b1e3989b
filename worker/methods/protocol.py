"""What a method is to the experiment that runs it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.ml.labels import LabelSet
from worker.predictions import Predictions

OnProgress = Callable[[float, str], None]
"""Called with the done share of the work at hand, 0 to 1, and a few words."""


def silent(_fraction: float, _message: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Rows:
    """N labelled texts.

    Args:
        texts: N texts.
        label_ids: `(N,)`.
        labels: All labels of the dataset; some may be missing here.
    """

    texts: tuple[str, ...]
    label_ids: NDArray[np.int64]
    labels: LabelSet


class Predictor(Protocol):
    """A method that has seen its train rows."""

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        """Answers for N texts, in their order."""


class Method(Protocol):
    """One way to classify, fitted on train rows; validation rows are for choosing, never for fitting."""

    def fit(self, train: Rows, validation: Rows, on_progress: OnProgress = silent) -> Predictor: ...
