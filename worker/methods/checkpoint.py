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

from worker.scratch import remove

_STATE = "state.json"
_PARTS = ("weights", "average", "best", "optimizer")
_PARTIAL = ".partial"


@dataclass
class TrainingState:
    """What is known after a step; epoch 0 is the model before its first.

    Args:
        recipe: Everything the run depends on; a checkpoint of another recipe is not continued.
        epoch: Epochs done.
        step: Steps done of the one after them.
        loss_sum: Of those steps.
        best_epoch: The one that stands highest on the validation rows so far.
        best_macro_f1: Its macro-F1 there, with `best_loss` to decide ties.
        train_seconds: Spent in training steps.
        train_tokens: Of the rows trained on: no padding, and what a step left out of them counts too.
        rows_at_once: Of a batch, what fits into memory; 0 for all.
        history: What each epoch came to.
        log: All that was told, in order.
    """

    recipe: dict[str, Any]
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_epoch: int = 0
    best_macro_f1: float = -1.0
    best_loss: float = float("inf")
    train_seconds: float = 0.0
    train_tokens: int = 0
    gradient_checkpointing: bool = False
    rows_at_once: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    log: list[dict[str, float | None]] = field(default_factory=list)


@dataclass
class Checkpoint:
    """Training state with the trainable weights now, their average, the best ones, and the optimizer's moments."""

    state: TrainingState
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def save(self, folder: Path, steps_done: int) -> Path:
        """Writes `folder/step-N`, whole or not at all, and keeps the one before it. Returns its path."""
        target = folder / f"step-{steps_done}"
        partial = folder / f"{target.name}{_PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in _PARTS:
            save_file(getattr(self, name), partial / f"{name}.safetensors")
        (partial / _STATE).write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        whole = sorted((path for path in folder.glob("step-*") if path.suffix != _PARTIAL), key=_number)
        for older in whole[:-2]:
            remove(older)
        return target

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        state = TrainingState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        return cls(state, *(load_file(folder / f"{name}.safetensors") for name in _PARTS))


def newest(folder: Path, recipe: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint below `folder` that is whole, undamaged and of this recipe."""
    whole = [path for path in folder.glob("step-*") if path.suffix != _PARTIAL]
    for path in sorted(whole, key=_number, reverse=True):
        # A damaged one, left by a machine that lost its power, would fail every attempt: the one before it is kept.
        with suppress(OSError, ValueError, TypeError, SafetensorError):
            checkpoint = Checkpoint.load(path)
            if _result_of(checkpoint.state.recipe) == _result_of(recipe):
                return checkpoint
    return None


def discard(folder: Path, *, beyond: int) -> None:
    """Deletes what later steps or other recipes have left: by their numbers they would be the newest."""
    for path in folder.glob("step-*"):
        if path.suffix == _PARTIAL or _number(path) > beyond:
            shutil.rmtree(path, ignore_errors=True)


def _result_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe decides the result: not gradient checkpointing, which is `auto` until training has ended."""
    return recipe | {"gradient_checkpointing": None}


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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
