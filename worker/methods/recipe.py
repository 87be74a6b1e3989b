"""What a fine-tune is asked to do."""

from dataclasses import dataclass

import numpy as np

from service.core.spec import TrainSpec
from service.ml.device import Precision

METHOD = 2
"""Raised where the same recipe comes to train otherwise: a checkpoint of before is not continued."""


@dataclass(frozen=True)
class LoraRecipe:
    """Everything a run depends on but the rows; no `auto` is left."""

    epochs: int
    batch_size: int
    learning_rate: float
    max_length: int
    rank: int
    alpha: int
    dropout: float
    precision: Precision
    gradient_checkpointing: bool | None
    """None: only if a batch does not fit without."""
    balanced: bool
    patience: int
    seed: int
    method: int = METHOD

    @classmethod
    def of(cls, spec: TrainSpec, seed: int) -> "LoraRecipe":
        """From a spec in which only `gradient_checkpointing` may still be `auto`."""
        assert spec.epochs != "auto" and spec.batch_size != "auto"  # noqa: PT018
        assert spec.learning_rate != "auto" and spec.precision != "auto"  # noqa: PT018
        return cls(
            spec.epochs, spec.batch_size, spec.learning_rate, spec.max_length, spec.lora_rank, spec.lora_alpha,
            spec.lora_dropout, spec.precision,
            None if spec.gradient_checkpointing == "auto" else spec.gradient_checkpointing,
            spec.class_weights == "balanced", spec.early_stopping_patience, seed,
        )  # fmt: skip


def auto_learning_rate(hidden_size: int) -> float:
    """2e-3 for MiniLM (H=384), falling with width: 4.6e-4 at H=1024, 1.6e-4 at H=2048."""
    return float(np.clip(2e-3 * (384 / hidden_size) ** 1.5, 1e-4, 2e-3))
