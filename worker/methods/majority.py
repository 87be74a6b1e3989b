"""Always the most frequent label: what any method has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.methods.protocol import OnProgress, Rows, silent
from worker.predictions import Predictions


@dataclass(frozen=True)
class MajorityPredictor:
    """Answers with the train rows' label frequencies, whatever the text."""

    frequencies: NDArray[np.float64]

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        n = len(texts)
        label_ids = np.full(n, int(self.frequencies.argmax()), dtype=np.int64)
        return Predictions(label_ids, np.tile(self.frequencies, (n, 1)))


class Majority:
    def fit(self, train: Rows, validation: Rows, on_progress: OnProgress = silent) -> MajorityPredictor:
        counts = np.bincount(train.label_ids, minlength=len(train.labels))
        return MajorityPredictor(counts / counts.sum())
