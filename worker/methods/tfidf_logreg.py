"""Bag of words and a logistic regression: seconds to train, and often hard to beat."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.calibration import fit_temperature
from worker.methods.protocol import OnProgress, Rows, silent
from worker.predictions import Predictions


@dataclass(frozen=True)
class TfidfPredictor:
    """A fitted scikit-learn pipeline over K labels, of which it has seen some, and its temperature."""

    pipeline: Any
    n_labels: int
    temperature: float

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        start = time.perf_counter()
        logits = np.full((len(texts), self.n_labels), -np.inf)  # of labels never seen: probability 0
        logits[:, self.pipeline.classes_] = self.pipeline.predict_log_proba(texts)
        seconds = time.perf_counter() - start
        return Predictions.of_logits(logits, self.temperature, seconds / max(len(texts), 1))


class TfidfLogreg:
    """Words and pairs of words, sublinear counts, C=10: the usual strong setting for short texts."""

    def fit(self, train: Rows, validation: Rows, on_progress: OnProgress = silent) -> TfidfPredictor:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        on_progress(0.0, "TF-IDF and logistic regression")
        # Tokens of one character count too: some languages write words with one, and "?" or "£" may tell labels apart.
        pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]"),  # noqa: S106
            LogisticRegression(C=10, max_iter=1000),
        )
        pipeline.fit(train.texts, train.label_ids)
        logits, seen = pipeline.predict_log_proba(validation.texts), pipeline.classes_
        known = np.isin(validation.label_ids, seen)
        temperature = fit_temperature(logits[known], np.searchsorted(seen, validation.label_ids[known]))
        return TfidfPredictor(pipeline, len(train.labels), temperature)
