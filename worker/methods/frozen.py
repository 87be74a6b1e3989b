"""The frozen base model: its states of texts, computed once, and linear probes on them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from service.ml.adapter import Adapter
from service.ml.encode import encode
from service.ml.engine import Engine
from service.ml.manifest import States
from worker.methods.protocol import OnProgress, Rows, silent
from worker.predictions import Predictions

# A probe learns little from more rows, and their states would fill the memory.
MAX_PROBE_ROWS = 50_000
Exact = NDArray[np.float64]
C_GRID = {"pooled": (3.0, 30.0), "head": (30.0, 300.0)}
MAP_ROWS = 10_000  # where there are fewer, the map between two poolings is fitted on parts of them too
RIDGE = 50.0  # as many rows of a state's mean variance pull each weight to zero


@dataclass
class FrozenBase:
    """An engine, the length texts are cut to, the states already computed, and engines of other precisions."""

    engine: Engine
    max_length: int
    others: dict[torch.dtype, Engine] = field(default_factory=dict)
    _states: dict[tuple[str, ...], dict[str, NDArray[np.float32]]] = field(default_factory=dict)

    def states(self, texts: tuple[str, ...], on_progress: OnProgress = silent) -> dict[str, NDArray[np.float32]]:
        """`head` (N, H') and `pooled` (N, H) of N texts; kept, since the probe and the fine-tune both want them."""
        if texts in self._states:
            return self._states[texts]
        wanted = set(texts)
        known = next((held for held in self._states if wanted <= set(held)), None)
        if known is not None:  # a part of rows that were all computed, such as a learning curve's: not kept twice
            place = {text: i for i, text in enumerate(known)}
            return {kind: values[[place[text] for text in texts]] for kind, values in self._states[known].items()}
        ids = encode(self.engine.backbone.tokenizer, texts, self.max_length).ids
        self._states[texts] = self.engine.states(
            ids, lambda done, n: on_progress(done / n, f"base model over {done}/{n} texts")
        )
        return self._states[texts]

    def logits(self, adapter: Adapter, texts: Sequence[str], on_progress: OnProgress = silent) -> NDArray[np.float32]:
        """`(N, K)` of N texts."""
        ids = encode(self.engine.backbone.tokenizer, texts, adapter.max_length).ids
        logits = self.engine.score(
            ids, [adapter] * len(ids), lambda done, n: on_progress(done / n, f"scored {done}/{n} texts")
        )
        return np.stack(logits) if logits else np.empty((0, len(adapter.labels)), np.float32)

    def predict(self, adapter: Adapter, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        """Answers as `/predict` would give them: the same encoding, the same engine."""
        start = time.perf_counter()
        logits = self.logits(adapter, texts, on_progress)
        seconds = (time.perf_counter() - start) / max(len(texts), 1)
        return Predictions.of_logits(logits, adapter.temperature, seconds)


@dataclass(frozen=True)
class Probe:
    """A linear head on frozen states.

    Args:
        weight: `(K, H)`.
        bias: `(K,)`; zeros where it was fitted without intercept.
        validation_accuracy: Of the better C of the grid.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    validation_accuracy: float


def fit_probe(
    base: FrozenBase, train: Rows, validation: Rows, kind: States, *, intercept: bool, on_progress: OnProgress = silent
) -> Probe:
    """Logistic regression on the frozen base's states, C chosen on the validation rows.

    For an encoder's stock head it is fitted on the states in the base's own pooling as far as they are linear in what
    that head sees, and the two maps are one. On MiniLM's [CLS] that is worth 0.7 points of BANKING77's test accuracy,
    and with 16 rows a label three, against a fit on what the head sees: the weights are pulled to zero along the wrong
    axes there. The map is fitted on parts of the rows too, where these are few. A decoder's own pooling is what its
    head sees, and a map would only shrink what tells rows apart.

    Args:
        base: The frozen base.
        train: What it is fitted on, the first `MAX_PROBE_ROWS` by a fixed stride.
        validation: What C is chosen on.
        kind: Which states.
        intercept: False where the head it starts has no bias.
        on_progress: Told the share done.

    Source: linear probing before fine-tuning, Kumar et al. 2022, arXiv:2202.10054.
    """
    from sklearn.linear_model import LogisticRegression

    stride = -(-len(train.texts) // MAX_PROBE_ROWS)
    states = base.states(train.texts[::stride], lambda share, text: on_progress(0.7 * share, text))
    to_validation = base.states(validation.texts, lambda share, text: on_progress(0.7 + 0.1 * share, text))
    x, x_validation = states[kind], to_validation[kind]
    mapped = kind == "head" and not base.engine.backbone.decoder
    if mapped:
        pieces = base.engine.states(_pieces(encode(base.engine.backbone.tokenizer, train.texts, base.max_length).ids))
        known = (np.concatenate([states[of], pieces[of]]).astype(np.float64) for of in ("head", "pooled"))
        by, shift = _linear_map(*known, intercept=intercept)
        x, x_validation = ((of @ by + shift).astype(np.float32) for of in (x, x_validation))
    # Scaled to a mean square length of 1, so that one grid of C fits every base; folded back into the weights.
    scale = 1 / max(float(np.sqrt((x.astype(np.float64) ** 2).sum(1).mean())), 1e-12)
    best: Probe | None = None
    for i, c in enumerate(C_GRID["pooled" if mapped else kind]):
        on_progress(0.8 + 0.1 * i, "logistic regression on the base model's states")
        model = LogisticRegression(C=c, max_iter=300, fit_intercept=intercept)
        model.fit(x * scale, train.label_ids[::stride])
        weight, bias = _full_head(model, len(train.labels))
        predicted = (x_validation * scale @ weight.T + bias).argmax(1)
        accuracy = float((predicted == validation.label_ids).mean()) if len(predicted) else 0.0
        if best is None or accuracy > best.validation_accuracy:
            weight *= scale
            if mapped:
                weight, bias = weight @ by.T, bias + weight @ shift
            best = Probe(weight.astype(np.float32), bias.astype(np.float32), accuracy)
    assert best is not None  # the grid is not empty
    return best


def _pieces(ids: Sequence[list[int]]) -> list[list[int]]:
    """Parts of rows, three to nine tenths of their tokens, with the first and last one: more texts for the map.

    It has nothing to do with labels, so what tells most is many texts: four parts of a row where there are few.
    """
    rng, pieces = np.random.default_rng(0), []
    long = [row for row in ids if len(row) > 3]
    for number in range(min(4 * len(long), max(MAP_ROWS - len(ids), 0))):
        first, *inner, last = long[number % len(long)]
        n = max(1, round(rng.uniform(0.3, 0.9) * len(inner)))
        start = int(rng.integers(len(inner) - n + 1))
        pieces.append([first, *inner[start : start + n], last])
    return pieces


def _linear_map(x: Exact, y: Exact, *, intercept: bool) -> tuple[Exact, Exact]:
    """`(H, D)` and `(D,)`, what takes N states `(N, H)` nearest to others `(N, D)`: ridge regression."""
    x_mean, y_mean = x.mean(0) * intercept, y.mean(0) * intercept
    gram = (x - x_mean).T @ (x - x_mean)
    gram += max(RIDGE * np.trace(gram) / (len(gram) * len(x)), 1e-12) * np.eye(len(gram))
    by = np.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
    return by, y_mean - x_mean @ by


def _full_head(model, n_labels: int) -> tuple[Exact, Exact]:  # type: ignore[no-untyped-def]
    """`(K, H)` and `(K,)` from scikit-learn's fit, which has one row for two classes and none for absent labels."""
    weight, bias = model.coef_, np.broadcast_to(model.intercept_, (len(model.coef_),))
    if len(model.classes_) == 2:
        weight, bias = np.vstack([-weight[0] / 2, weight[0] / 2]), np.array([-bias[0] / 2, bias[0] / 2])
    full_weight = np.zeros((n_labels, weight.shape[1]))
    full_bias = np.full(n_labels, float(np.min(bias)) - 5.0 if model.fit_intercept else 0.0)
    full_weight[model.classes_], full_bias[model.classes_] = weight, bias
    return full_weight, full_bias
