"""A fitted method on disk, loaded again the way serving loads it: what is judged is what will answer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from service.core.errors import RoundTripFailed
from service.ml.adapter import Adapter, load_adapter
from service.ml.manifest import Manifest, States
from worker.calibration import fit_temperature, precision_points
from worker.methods.frozen import FrozenBase
from worker.methods.protocol import OnProgress, Rows, silent
from worker.predictions import Predictions

ROUND_TRIP_ROWS = 64
# Relative error of the reloaded model's logits: bf16 keeps 8 bits, and errors add up over the layers.
ROUND_TRIP_TOLERANCE = {"fp32": 1e-3, "bf16": 0.08}


class Saveable(Protocol):
    """A fitted method that can be served."""

    @property
    def states(self) -> States: ...
    def save(self, folder: Path) -> None: ...
    def logits(self, texts: tuple[str, ...]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Served:
    """A saved model, answering as `/predict` would, and its answers for the validation rows."""

    base: FrozenBase
    adapter: Adapter
    validation: Predictions

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        return self.base.predict(self.adapter, texts, on_progress)


def save_and_serve(
    fitted: Saveable, folder: Path, manifest: Manifest, base: FrozenBase, validation: Rows,
    on_progress: OnProgress = silent,
) -> Served:  # fmt: skip
    """Saves a model, loads it, checks that it still answers the same, and fits its temperature and thresholds.

    The manifest is written before, because loading checks it, and again with what the validation rows gave.

    Raises:
        RoundTripFailed: the loaded model answers otherwise than the fitted one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fitted.save(folder)
    manifest.write(folder)
    backbone = base.engine.backbone
    dtype = next(backbone.model.parameters()).dtype
    adapter = load_adapter(folder, head_name=backbone.head_name, device=backbone.device, dtype=dtype)
    base.engine.attach(adapter)
    start = time.perf_counter()
    logits = base.logits(adapter, validation.texts, on_progress)
    seconds_per_row = (time.perf_counter() - start) / len(logits)
    _check_round_trip(manifest, fitted.logits(validation.texts[:ROUND_TRIP_ROWS]), logits[:ROUND_TRIP_ROWS], dtype)
    temperature = fit_temperature(logits, validation.label_ids)
    answers = Predictions.of_logits(logits, temperature, seconds_per_row)
    assert answers.probabilities is not None  # made of logits
    points = precision_points(answers.probabilities.max(1), answers.label_ids == validation.label_ids)
    calibration = {"rows": len(logits), "points": points}
    replace(manifest, temperature=temperature, calibration=calibration).write(folder)
    return Served(base, replace(adapter, temperature=temperature), answers)


def _check_round_trip(
    manifest: Manifest, expected: NDArray[np.float32], got: NDArray[np.float32], dtype: torch.dtype
) -> None:
    error = float(np.linalg.norm(got - expected) / max(float(np.linalg.norm(expected)), 1e-12))
    coarsest = "bf16" if manifest.precision == "bf16" or dtype == torch.bfloat16 else "fp32"
    if not error <= ROUND_TRIP_TOLERANCE[coarsest]:
        raise RoundTripFailed(
            f"The saved {manifest.method} model, loaded again, is {error:.3g} away from the trained one (allowed: "
            f"{ROUND_TRIP_TOLERANCE[coarsest]:g}). It is not published."
        )
