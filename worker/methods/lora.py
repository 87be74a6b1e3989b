"""The fine-tune: LoRA on the attention projections and a classification head that starts from a linear probe.

Hu et al. 2021 (arXiv:2106.09685) for LoRA; Kumar et al. 2022 (arXiv:2202.10054) for the start of the head; Polyak and
Juditsky 1992 for averaging the weights. The frozen base runs in the engine, with what serving makes of its speed.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.ml.backbone import Backbone, load_backbone
from service.ml.device import DTYPES
from service.ml.encode import encode, token_batches
from service.ml.engine import MAX_ROWS, TOKEN_BUDGET, Engine
from service.ml.manifest import States
from worker.methods.checkpoint import TrainingState, discard, newest
from worker.methods.frozen import FrozenBase, fit_probe
from worker.methods.parts import LABEL_SMOOTHING, TOKEN_DROPOUT, Helper, peak_bytes
from worker.methods.protocol import OnProgress, Rows, silent
from worker.methods.recipe import LoraRecipe
from worker.methods.trainable import Trainable, Weights
from worker.methods.training import OnEvent, Run
from worker.stop import Stop

LOSS_EVENTS = 200  # of a whole run, so that a curve can be drawn while it grows
CHECKPOINT_SECONDS = 60.0


@dataclass
class Trained:
    """A fine-tuned model and how it came about.

    Args:
        trainable: What trained it.
        weights: Its best ones.
        recipe: As run.
        state: After the last epoch.
        truncated_texts: Of train and validation, longer than `max_length`.
    """

    trainable: Trainable
    weights: Weights
    recipe: LoraRecipe
    state: TrainingState
    truncated_texts: int
    peak_memory_bytes: int
    states: States = "head"

    @property
    def backbone(self) -> Backbone:
        return self.trainable.engine.backbone

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`(N, K)` as the trainer computes them, which is not how serving adds LoRA."""
        encoded = encode(self.backbone.tokenizer, texts, self.recipe.max_length)
        budget, answers = TOKEN_BUDGET.get(self.backbone.device.type, 4096), dict[int, NDArray[np.float32]]()
        self.trainable.load(self.weights)
        with torch.no_grad(), self.trainable.engine.changed(self.trainable.change):
            for rows in token_batches(encoded.lengths, budget, MAX_ROWS):
                logits = self.trainable.logits([encoded.ids[i] for i in rows])
                answers |= dict(zip(rows.tolist(), logits.cpu().numpy(), strict=True))
        return np.stack([answers[i] for i in range(len(texts))])

    def save(self, folder: Path) -> None:
        """PEFT's files and the tokenizer: what stock PEFT needs on the stock base model."""
        self.trainable.save(folder, self.weights, self.recipe.alpha)

    def facts(self) -> dict[str, Any]:
        """The `training` block of metrics.json."""
        trainable = sum(tensor.numel() for tensor in self.weights.values())
        return {
            "epochs_run": self.state.epoch,
            "best_epoch": self.state.best_epoch,
            "best_validation_macro_f1": self.state.best_macro_f1,
            "trainable_parameters": trainable,
            "total_parameters": trainable + sum(p.numel() for p in self.backbone.model.parameters()),
            "train_seconds": self.state.train_seconds,
            "tokens_per_second": self.state.train_tokens / max(self.state.train_seconds, 1e-9),
            "peak_memory_bytes": self.peak_memory_bytes,
            "precision": self.recipe.precision,
            "gradient_checkpointing": self.state.gradient_checkpointing,
            "truncated_texts": self.truncated_texts,
            "label_smoothing": LABEL_SMOOTHING,
            "token_dropout": TOKEN_DROPOUT if self.recipe.dropout else 0.0,
            "history": [_finite(epoch) for epoch in self.state.history],
        }


@dataclass
class Lora:
    """Fine-tunes, from the newest checkpoint in `checkpoints` on, where one is left every `checkpoint_seconds`.

    Told to `stop` while it trains, it leaves one too. `on_resume` hears the share that was found done, and where
    that is.
    """

    base: FrozenBase
    recipe: LoraRecipe
    checkpoints: Path
    on_checkpoint: Callable[[Path], None] = lambda _path: None
    on_event: OnEvent = lambda _type, _message, _data: None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    stop: Stop = field(default_factory=Stop)
    on_resume: OnProgress = silent

    def fit(self, train: Rows, validation: Rows, on_progress: OnProgress = silent) -> Trained:
        """Trains for the recipe's epochs, or until validation stops improving; the best epoch's weights win.

        Raises:
            OutOfMemory: a single text does not fit even with gradient checkpointing.
            Stopped: it was told to.
        """
        recipe, device = self.recipe, self.base.engine.backbone.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        resumed = newest(self.checkpoints, asdict(recipe))
        probe = None if resumed else fit_probe(
            self.base, train, validation, "head", intercept=self.base.engine.head_has_bias,
            on_progress=lambda share, text: on_progress(0.1 * share, text),
        )  # fmt: skip
        trainable = Trainable.start(
            self._engine(), recipe.rank, recipe.alpha, recipe.dropout, len(train.labels), probe, recipe.seed
        )
        run = Run(trainable, recipe, train, validation, resumed, self.on_event)
        discard(self.checkpoints, beyond=run.steps_done if resumed else -1)
        if resumed:
            epoch, step = divmod(run.steps_done - 1, run.steps_per_epoch)
            where = f"epoch {epoch + 1}, step {step + 1} of {run.steps_per_epoch}"
            self.on_resume(
                0.1 + 0.9 * run.steps_done / (run.steps_per_epoch * recipe.epochs),
                f"Training goes on from its checkpoint: {where if run.steps_done else 'before the first step'}.",
            )
        with run.helped() as helpers:
            self._train(run, lambda share, text: on_progress(0.1 + 0.9 * share, text))
        truncated = int(run.encoded.truncated.sum() + run.encoded_validation.truncated.sum())
        return Trained(trainable, run.best, recipe, run.state, truncated, _peak_memory(device, helpers))

    def _engine(self) -> Engine:
        """The base's own where it is of the precision asked for, else another, which the base keeps."""
        frozen, dtype = self.base.engine.backbone, DTYPES[self.recipe.precision]
        if next(frozen.model.parameters()).dtype == dtype:
            return self.base.engine
        if dtype not in self.base.others:
            self.base.others[dtype] = Engine(load_backbone(frozen.source, device=frozen.device, dtype=dtype))
        return self.base.others[dtype]

    def _train(self, run: Run, on_progress: OnProgress) -> None:
        state, epochs = run.state, self.recipe.epochs
        every = max(1, run.steps_per_epoch * epochs // LOSS_EVENTS)
        saved = time.monotonic()
        if not state.history:
            self._judge(run)
            saved = self._save(run)  # on a slow machine the probe alone can take longer than an attempt lives
        run.wait_for_helpers()  # here, where a stop need not wait for it
        while state.epoch < epochs and not self._out_of_patience(state):
            number, recent = state.epoch + 1, []
            for loss in self._until_stopped(run):
                recent.append(loss)
                step = state.step
                on_progress(run.steps_done / (run.steps_per_epoch * epochs),
                            f"epoch {number}/{epochs}, step {step}/{run.steps_per_epoch}")  # fmt: skip
                if len(recent) == every or step == run.steps_per_epoch:
                    # Read from the device now and then only: each time waits for all work sent to it.
                    self._tell_loss(run, float(torch.stack(recent).mean()))
                    recent = []
                # At an epoch's end there is one all the same, of that name.
                if time.monotonic() - saved >= self.checkpoint_seconds and step < run.steps_per_epoch:
                    saved = self._save(run)
            self._judge(run)
            saved = self._save(run)

    def _until_stopped(self, run: Run) -> Iterator[Tensor]:
        """The steps of an epoch, each whole; what is told to stop meanwhile leaves a checkpoint. Raises Stopped."""
        with self.stop.waits():
            for loss in run.epoch():
                yield loss
                if self.stop.asked:
                    self._save(run)
                    break

    def _save(self, run: Run) -> float:
        """Leaves a checkpoint; gives the time."""
        with self.stop.waits():
            self.on_checkpoint(run.checkpoint().save(self.checkpoints, run.steps_done))
        return time.monotonic()

    def _judge(self, run: Run) -> None:
        macro_f1, loss = run.validate()
        state = run.state
        state.history.append({"epoch": state.epoch, "validation_macro_f1": macro_f1, "validation_loss": loss})
        if state.epoch:
            state.history[-1]["train_loss"] = float(run.loss_sum) / run.steps_per_epoch
            run.loss_sum.zero_()
        if (macro_f1, -loss) > (state.best_macro_f1, -state.best_loss):
            state.best_epoch, state.best_macro_f1, state.best_loss = state.epoch, macro_f1, loss
            run.best = {name: tensor.clone() for name, tensor in run.average.items()}
        name = f"epoch {state.epoch}" if state.epoch else "before the first step"
        self._tell(state, f"{name}: validation macro-F1 {macro_f1:.4f}", state.history[-1])

    def _tell_loss(self, run: Run, loss: float) -> None:
        epoch = run.steps_done / run.steps_per_epoch
        rate = run.state.train_tokens / max(run.state.train_seconds, 1e-9)
        data = {"epoch": epoch, "train_loss": loss, "learning_rate": run.learning_rate(run.steps_done),
                "tokens_per_second": rate}  # fmt: skip
        self._tell(run.state, f"epoch {epoch:.2f}: training loss {loss:.4f}", data)

    def _tell(self, state: TrainingState, message: str, data: Mapping[str, float]) -> None:
        state.log.append(_finite(data))
        self.on_event("metric", message, _finite(data))

    def _out_of_patience(self, state: TrainingState) -> bool:
        return 0 < self.recipe.patience <= state.epoch - state.best_epoch


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is no number any more, as a loss that diverged: JSON has no word for it."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _peak_memory(device: torch.device, helpers: Sequence[Helper]) -> int:
    """Bytes: of the GPU's allocator, else the largest resident sizes of the process and of those that helped it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_bytes() + sum(helper.peak_bytes for helper in helpers)
