"""One training run: its steps, and where it stands after each."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from service.core.errors import OutOfMemory
from service.ml.encode import encode
from service.ml.engine import TOKEN_BUDGET
from worker.methods.checkpoint import Checkpoint, TrainingState, optimizer_tensors, restore_optimizer
from worker.methods.protocol import Rows
from worker.methods.recipe import LoraRecipe
from worker.methods.trainable import Trainable, Weights

LABEL_SMOOTHING = 0.1
WARMUP = 0.06
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
# Of the moving average of the weights, which is what is judged and kept: on BANKING77 its validation macro-F1 stood
# about 0.01 above the last step's in the middle of training. Shorter while little has been averaged.
AVERAGE_DECAY = 0.997
LEAST_TOKENS = 128  # of a batch, for each part of it that a thread of its own computes

OnEvent = Callable[[str, str, dict[str, Any]], None]
"""Called with an event's type, message and data."""


class Run:
    """Model, optimizer, rows, and where the run stands.

    What is drawn at random depends on seed and place alone, so a run that goes on from a checkpoint repeats it.
    """

    def __init__(
        self, trainable: Trainable, recipe: LoraRecipe, train: Rows, validation: Rows, resumed: Checkpoint | None,
        on_event: OnEvent,
    ) -> None:  # fmt: skip
        backbone = trainable.engine.backbone
        self.trainable, self.recipe, self.train, self.validation = trainable, recipe, train, validation
        self.device, self._model, self._on_event = backbone.device, backbone.model, on_event
        self.encoded = encode(backbone.tokenizer, train.texts, recipe.max_length)
        self.encoded_validation = encode(backbone.tokenizer, validation.texts, recipe.max_length)
        self.lengths = self.encoded.lengths
        self.targets = torch.from_numpy(train.label_ids).to(self.device)
        self._of_label = label_weights(train, balanced=recipe.balanced).to(self.device)
        self._loss = nn.CrossEntropyLoss(weight=self._of_label, label_smoothing=LABEL_SMOOTHING, reduction="sum")
        self.steps_per_epoch = math.ceil(len(train.texts) / recipe.batch_size)
        self.optimizer = torch.optim.AdamW(
            list(trainable.weights.values()), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY,
            fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self._threads = torch.get_num_threads()
        a_batch = float(self.lengths.mean()) * recipe.batch_size
        side_by_side = self.device.type == "cpu" and trainable.engine.packs(int(self.lengths.max()))
        self._workers = int(np.clip(a_batch // LEAST_TOKENS, 1, self._threads)) if side_by_side else 1
        self._pool: ThreadPoolExecutor | None = None
        self.state = resumed.state if resumed else TrainingState(asdict(recipe))
        best, average = (resumed.best, resumed.average) if resumed else (self.weights(), self.weights())
        self.best, self.average = (
            {name: known[name].to(self.device) for name in trainable.weights} for known in (best, average)
        )
        self.loss_sum = torch.tensor(self.state.loss_sum, device=self.device)
        if resumed:
            trainable.load(resumed.weights)
            restore_optimizer(self.optimizer, resumed.optimizer)
        if recipe.gradient_checkpointing or self.state.gradient_checkpointing:
            self._checkpoint_activations()

    @property
    def steps_done(self) -> int:
        return self.state.epoch * self.steps_per_epoch + self.state.step

    def weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.trainable.weights.items()}

    def checkpoint(self) -> Checkpoint:
        self.state.loss_sum = float(self.loss_sum)
        return Checkpoint(self.state, self.weights(), self.average, self.best, optimizer_tensors(self.optimizer))

    def epoch(self) -> Iterator[Tensor]:
        """The steps of the epoch at hand that are still to do; gives each one's loss when it is done."""
        rng = np.random.default_rng([self.recipe.seed, self.state.epoch + 1])
        batches = list(epoch_batches(self.lengths, self.recipe.batch_size, rng))
        with self._side_by_side():
            yield from self._steps(batches[self.state.step :])
        self.state.epoch, self.state.step = self.state.epoch + 1, 0

    @contextmanager
    def _side_by_side(self) -> Iterator[None]:
        """Parts of a batch on cores of their own: the threads of one product wait for each other at every one.

        With two cores, and threads that sleep while they wait, 290 rows a second of the median batch against 205.
        """
        if self._workers == 1:
            yield
            return
        each = self._threads // self._workers
        self.trainable.engine.packs(int(self.lengths.max()))  # what was judged may have been padded
        try:
            with ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(each,)) as self._pool:
                yield
        finally:
            self._pool = None
            torch.set_num_threads(self._threads)

    def _steps(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        for rows in batches:
            start = time.perf_counter()
            rate = self.learning_rate(self.steps_done + 1)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._fitting_step(rows)
            self.state.step += 1
            self._add_to_average()
            self.loss_sum += loss
            self.state.train_seconds += time.perf_counter() - start
            self.state.train_tokens += int(self.lengths[rows].sum())
            yield loss

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        steps = self.steps_per_epoch * self.recipe.epochs
        warmup = max(1, round(WARMUP * steps))
        if step <= warmup:
            return self.recipe.learning_rate * step / warmup
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    def validate(self) -> tuple[float, float]:
        """Macro-F1 over all labels and mean cross-entropy of the averaged weights, on the validation rows."""
        from sklearn.metrics import f1_score

        adapter, ids = self.trainable.adapter(self.average, self.train.labels.names), self.encoded_validation.ids
        logits = torch.from_numpy(np.stack(self.trainable.engine.score(ids, [adapter] * len(ids))))
        true = self.validation.label_ids
        loss = float(nn.functional.cross_entropy(logits, torch.from_numpy(true)))
        labels = range(len(self.train.labels))
        macro = f1_score(true, logits.argmax(1).numpy(), labels=labels, average="macro", zero_division=0)
        return float(macro), loss

    def _add_to_average(self) -> None:
        decay = min(AVERAGE_DECAY, (1 + self.steps_done) / (10 + self.steps_done))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.average.values()), [p.detach() for p in self.trainable.weights.values()], None)

    def _fitting_step(self, rows: NDArray[np.int64]) -> Tensor:
        while True:
            try:
                return self._step(rows)
            except torch.OutOfMemoryError as error:
                self._ask_for_less(rows, error)
            torch.cuda.empty_cache()

    def _ask_for_less(self, rows: NDArray[np.int64], error: Exception) -> None:
        """Half as many rows at a time; at one row, gradient checkpointing and all rows again. Raises OutOfMemory."""
        at_once = min(self.state.rows_at_once or len(rows), len(rows))
        if at_once > 1:
            self.state.rows_at_once = at_once // 2
            how = f"{at_once // 2} of a batch's {len(rows)} rows are computed at a time"
        elif self.recipe.gradient_checkpointing is None and not self.state.gradient_checkpointing:
            self._checkpoint_activations()
            self.state.rows_at_once = 0
            how = "activations are computed twice instead of kept"
        else:
            longest = int(self.lengths[rows].max())
            held = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
            raise OutOfMemory(
                f"One text of up to {longest} tokens does not fit into the GPU's memory ({held / 1e9:.1f} GB were "
                "in use).",
                hint="Lower train.max_length, let gradient_checkpointing be 'auto', or use a smaller base model.",
            ) from error
        self._on_event("message", f"The GPU's memory ran out: {how} from here on.", {"step": self.steps_done + 1})

    def _checkpoint_activations(self) -> None:
        self.state.gradient_checkpointing = True
        model: Any = self._model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _step(self, rows: NDArray[np.int64]) -> Tensor:
        """The batch's mean loss. Its rows go by in parts that fit the token budget; gradients add up."""
        parts = self._parts(self.lengths[rows])
        whole = self._of_label[self.targets[rows]].sum().clamp_min(1e-12)
        weights = list(self.trainable.weights.values())
        place = [self.recipe.seed, 0, self.steps_done]

        def of_part(number: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            chosen = rows[parts[number]]
            seed = int(np.random.default_rng([*place, number]).integers(2**63))
            drawn = torch.Generator(self.device).manual_seed(seed)
            with self.trainable.engine.changed(self.trainable.change):
                logits = self.trainable.logits([self.encoded.ids[i] for i in chosen], drawn)
                loss = self._loss(logits, self.targets[chosen]) / whole
                return loss.detach(), torch.autograd.grad(loss, weights)

        self._model.train(self.state.gradient_checkpointing)  # transformers asks; every dropout of the base is 0
        total = torch.zeros((), device=self.device)
        sums = [torch.zeros_like(weight) for weight in weights]
        try:
            # Added up in order, so that the sum is the same whoever was first.
            for loss, gradients in (self._pool.map if self._pool else map)(of_part, range(len(parts))):
                total += loss
                for summed, gradient in zip(sums, gradients, strict=True):
                    summed.add_(gradient)
        finally:
            self._model.eval()
        for weight, summed in zip(weights, sums, strict=True):
            weight.grad = summed
        nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        self.optimizer.step()
        return total

    def _parts(self, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Positions of rows, shortest first, in parts of about equally many tokens."""
        n_rows, budget = len(lengths), TOKEN_BUDGET.get(self.device.type, 4096)
        n = max(self._workers, -(-int(lengths.sum()) // budget), -(-n_rows // (self.state.rows_at_once or n_rows)))
        order, n = np.argsort(lengths, kind="stable"), min(n, n_rows)
        return [order[i::n] for i in range(n)]


def epoch_batches(lengths: NDArray[np.int64], batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Every row once, in batches of rows of similar length, the batches in random order.

    Args:
        lengths: `(N,)` tokens per row.
        batch_size: Rows in a batch; the last may be shorter.
        rng: Decides the order.
    """
    pool_rows = 32 * batch_size  # sorted within a pool only, so that batches differ from epoch to epoch
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool_rows):
        pool = order[start : start + pool_rows]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def label_weights(train: Rows, *, balanced: bool) -> Tensor:
    """`(K,)`: 1, or balanced: inverse to the label's frequency, mean 1 over the rows; 0 where train has none."""
    counts = np.bincount(train.label_ids, minlength=len(train.labels))
    if not balanced:
        return torch.ones(len(counts))
    present = (counts > 0).sum()
    weights = np.divide(len(train.texts), present * counts, out=np.zeros(len(counts)), where=counts > 0)
    return torch.tensor(weights, dtype=torch.float32)
