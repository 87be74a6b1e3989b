"""The base model as it is, and a logistic regression on its pooled states: a minute's work, and servable."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from service.ml.adapter import save_head
from service.ml.manifest import States
from worker.methods.frozen import FrozenBase, Probe, fit_probe
from worker.methods.protocol import OnProgress, Rows, silent


@dataclass(frozen=True)
class EmbeddingPredictor:
    """A fitted probe; it answers once it is saved and loaded as serving does."""

    base: FrozenBase
    probe: Probe
    states: States = "pooled"

    def logits(self, texts: tuple[str, ...]) -> NDArray[np.float32]:
        return self.base.states(texts)["pooled"] @ self.probe.weight.T + self.probe.bias

    def save(self, folder: Path) -> None:
        save_head(folder, torch.from_numpy(self.probe.weight), torch.from_numpy(self.probe.bias))


@dataclass(frozen=True)
class EmbeddingLogreg:
    """On the pooling the base's own makers chose (mean for MiniLM, the last token for F2LLM)."""

    base: FrozenBase

    def fit(self, train: Rows, validation: Rows, on_progress: OnProgress = silent) -> EmbeddingPredictor:
        return EmbeddingPredictor(
            self.base, fit_probe(self.base, train, validation, "pooled", intercept=True, on_progress=on_progress)
        )
