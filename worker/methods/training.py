"""One training run: its steps, and where it stands after each."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from worker.methods.parts import Computed, Helper, HelperGone, Part, Parts
from worker.methods.protocol import Rows
from worker.methods.ranks import Ranks, world_size
from worker.methods.recipe import LoraRecipe
from worker.methods.trainable import Trainable, Weights
from worker.stop import Stopped

WARMUP = 0.06
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
# Of the moving average of the weights, which is what is judged and kept: on BANKING77 its validation macro-F1 stood
# about 0.01 above the last step's in the middle of training. Shorter while little has been averaged.
AVERAGE_DECAY = 0.997
# What a helper has to do at least, so that starting it pays: tokens of a batch, and steps of a run. Each loads the base
# anew, and the products of a large one keep all cores at work by themselves.
LEAST_TOKENS, LEAST_STEPS, MOST_HELPERS, LARGEST_BASE_BYTES = 128, 100, 3, 500_000_000

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
        self._of_label = label_weights(train, balanced=recipe.balanced)
        self._here = Parts(trainable, self.encoded.ids, self.targets, self._of_label.to(self.device))
        self.steps_per_epoch = math.ceil(len(train.texts) / recipe.batch_size)
        self.optimizer = torch.optim.AdamW(
            list(trainable.weights.values()), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY,
            fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self._threads = torch.get_num_threads()
        self._helpers: list[Helper] = []
        self._ranks: Ranks | None = None
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
        torch.set_num_threads(self._threads // (1 + len(self._helpers)))
        try:
            yield from self._steps(batches[self.state.step :])
        finally:
            torch.set_num_threads(self._threads)
        self.state.epoch, self.state.step = self.state.epoch + 1, 0

    @contextmanager
    def helped(self) -> Iterator[list[Helper]]:
        """Until it ends, parts of a batch are computed by other ranks, or on a CPU by processes beside this one."""
        if world_size() > 1:
            with self._helpers_there():
                self._ranks = Ranks(self._here)
            yield []
            return
        base_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        pays = self.steps_per_epoch * self.recipe.epochs >= LEAST_STEPS and base_bytes <= LARGEST_BASE_BYTES
        n_tokens = float(self.lengths.mean()) * self.recipe.batch_size
        most = min(self._threads, 1 + MOST_HELPERS) if self.device.type == "cpu" and pays else 1
        n = int(np.clip(n_tokens // LEAST_TOKENS, 1, most))
        with ExitStack() as held:
            self._helpers = [held.enter_context(Helper(self._here, self._threads // n)) for _ in range(n - 1)]
            yield self._helpers

    def wait_for_helpers(self) -> None:
        """Until all have loaded the base; what begins a step waits too."""
        with self._helpers_there():
            for helper in self._helpers:
                helper.wait()

    @contextmanager
    def _helpers_there(self) -> Iterator[None]:
        """Where one is not, it is as if this process had been killed: the next attempt goes on from the checkpoint."""
        try:
            yield
        except HelperGone as error:
            self._on_event("message", f"This attempt is given up: {error}", {})
            raise Stopped from error

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
        self._here.checkpoint_activations()

    def _step(self, rows: NDArray[np.int64]) -> Tensor:
        """The batch's mean loss. Its rows go by in parts that fit the token budget; gradients add up."""
        whole = max(float(self._of_label[self.train.label_ids[rows]].sum()), 1e-12)
        place = [self.recipe.seed, 0, self.steps_done]
        parts = [
            Part(rows[chosen], whole, int(np.random.default_rng([*place, number]).integers(2**63)))
            for number, chosen in enumerate(self._parts(self.lengths[rows]))
        ]
        weights = list(self.trainable.weights.values())
        total = torch.zeros((), device=self.device)
        sums = [torch.zeros_like(weight) for weight in weights]
        # Added up in order, so that the sum is the same whoever was first.
        for loss, gradients in self._computed(parts):
            total += loss
            for summed, gradient in zip(sums, gradients, strict=True):
                summed.add_(gradient)
        for weight, summed in zip(weights, sums, strict=True):
            weight.grad = summed
        nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        self.optimizer.step()
        return total

    def _computed(self, parts: list[Part]) -> Iterator[Computed]:
        """Each part, in order; the sum where there are ranks."""
        if self._ranks is not None:
            with self._helpers_there():
                yield self._ranks.compute(parts)
            return
        at_once = 1 + len(self._helpers)
        for start in range(0, len(parts), at_once):
            mine, *theirs = parts[start : start + at_once]
            with self._helpers_there():
                for helper, part in zip(self._helpers, theirs, strict=False):
                    helper.begin(part)
                yield self._here.compute(mine)
                for helper, _part in zip(self._helpers, theirs, strict=False):
                    yield helper.computed()

    def _parts(self, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Positions of rows, shortest first, in parts of about equally many tokens."""
        n_rows, n_tokens, budget = len(lengths), int(lengths.sum()), TOKEN_BUDGET.get(self.device.type, 4096)
        at_once = max(world_size(), 1 + len(self._helpers))
        n = max(at_once, -(-n_tokens // budget), -(-n_rows // (self.state.rows_at_once or n_rows)))
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
