"""Where a fine-tune stands, on disk: safetensors and JSON, never a pickle."""

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_STATE = "state.json"
_PARTS = ("weights", "average", "best", "optimizer")
_PARTIAL = ".partial"


@dataclass
class TrainingState:
    """What is known after an epoch; epoch 0 is the model before its first step.

    Args:
        recipe: Everything the run depends on; a checkpoint of another recipe is not continued.
        epoch: Epochs done.
        best_epoch: The one that stands highest on the validation rows so far.
        best_macro_f1: Its macro-F1 there, with `best_loss` to decide ties.
        train_seconds: Spent in training steps.
        train_tokens: Real tokens trained on, padding not counted.
    """

    recipe: dict[str, Any]
    epoch: int = 0
    best_epoch: int = 0
    best_macro_f1: float = -1.0
    best_loss: float = float("inf")
    train_seconds: float = 0.0
    train_tokens: int = 0
    gradient_checkpointing: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Checkpoint:
    """Training state with the trainable weights now, their average, the best ones, and the optimizer's moments."""

    state: TrainingState
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def save(self, folder: Path) -> Path:
        """Writes `folder/epoch-N`, whole or not at all, and keeps the one before it. Returns its path."""
        target = folder / f"epoch-{self.state.epoch}"
        partial = folder / f"{target.name}{_PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in _PARTS:
            save_file(getattr(self, name), partial / f"{name}.safetensors")
        (partial / _STATE).write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        for older in folder.glob("epoch-*"):
            if _number(older) < self.state.epoch - 1:
                shutil.rmtree(older, ignore_errors=True)
        return target

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        state = TrainingState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        return cls(state, *(load_file(folder / f"{name}.safetensors") for name in _PARTS))


def newest(folder: Path, recipe: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint below `folder` that is whole, undamaged and of this recipe."""
    whole = [path for path in folder.glob("epoch-*") if path.suffix != _PARTIAL]
    for path in sorted(whole, key=_number, reverse=True):
        # A damaged one, left by a machine that lost its power, would fail every attempt: the one before it is kept.
        with suppress(OSError, ValueError, TypeError, SafetensorError):
            checkpoint = Checkpoint.load(path)
            if _result_of(checkpoint.state.recipe) == _result_of(recipe):
                return checkpoint
    return None


def _result_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe decides the result: not gradient checkpointing, which is `auto` until training has ended."""
    return recipe | {"gradient_checkpointing": None}


def _number(path: Path) -> int:
    return int(path.name.removeprefix("epoch-").removesuffix(_PARTIAL))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat named tensors: `3.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        whole["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(whole)
