"""The fine-tune: LoRA on the attention projections and a classification head that starts from a linear probe.

Hu et al. 2021 (arXiv:2106.09685) for LoRA; Kumar et al. 2022 (arXiv:2202.10054) for the start of the head; Polyak and
Juditsky 1992 for averaging the weights.
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
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from service.core.errors import OutOfMemory
from service.core.spec import TrainSpec
from service.ml.backbone import Backbone, load_backbone
from service.ml.device import DTYPES, Precision
from service.ml.encode import Encoded, encode, token_batches
from service.ml.engine import TOKEN_BUDGET
from service.ml.manifest import States
from worker.methods.checkpoint import Checkpoint, TrainingState, newest, optimizer_tensors, restore_optimizer
from worker.methods.frozen import FrozenBase, Probe, fit_probe
from worker.methods.protocol import OnProgress, Rows, silent

LABEL_SMOOTHING = 0.1
WARMUP = 0.06
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
# Of the moving average of the weights, which is what is judged and kept: on BANKING77 its validation macro-F1 stood
# about 0.01 above the last step's in the middle of training. Shorter while little has been averaged.
AVERAGE_DECAY = 0.997
LOSS_EVENTS = 200  # of a whole run, so that a curve can be drawn while it grows

OnEvent = Callable[[str, str, dict[str, Any]], None]
"""Called with an event's type, message and data."""
OnLoss = Callable[[float, float, float], None]


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


@dataclass
class Trained:
    """A fine-tuned model and how it came about.

    Args:
        model: The PEFT model with its best weights.
        backbone: Under it.
        recipe: As run.
        state: After the last epoch.
        truncated_texts: Of train and validation, longer than `max_length`.
    """

    model: Any
    backbone: Backbone
    recipe: LoraRecipe
    state: TrainingState
    truncated_texts: int
    peak_memory_bytes: int
    states: States = "head"

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`(N, K)` as the trainer computes them."""
        encoded = encode(self.backbone.tokenizer, texts, self.recipe.max_length)
        return _logits(self.model, self.backbone, encoded)

    def save(self, folder: Path) -> None:
        """PEFT's files and the tokenizer: what stock PEFT needs on the stock base model."""
        base = self.backbone.source.base
        config = self.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = base.repo or base.name, self.backbone.source.revision
        self.model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        self.backbone.tokenizer.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """The `training` block of metrics.json."""
        trainable, total = self.model.get_nb_trainable_parameters()
        return {
            "epochs_run": self.state.epoch,
            "best_epoch": self.state.best_epoch,
            "best_validation_macro_f1": self.state.best_macro_f1,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "train_seconds": self.state.train_seconds,
            "tokens_per_second": self.state.train_tokens / max(self.state.train_seconds, 1e-9),
            "peak_memory_bytes": self.peak_memory_bytes,
            "precision": self.recipe.precision,
            "gradient_checkpointing": self.state.gradient_checkpointing,
            "truncated_texts": self.truncated_texts,
            "label_smoothing": LABEL_SMOOTHING,
            "history": [_finite(epoch) for epoch in self.state.history],
        }


@dataclass
class Lora:
    """Fine-tunes, resuming from the newest checkpoint in `checkpoints`."""

    base: FrozenBase
    recipe: LoraRecipe
    checkpoints: Path
    on_checkpoint: Callable[[Path], None] = lambda _path: None
    on_event: OnEvent = lambda _type, _message, _data: None
    _device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self._device = self.base.engine.backbone.device

    def fit(self, train: Rows, validation: Rows, on_progress: OnProgress = silent) -> Trained:
        """Trains for the recipe's epochs, or until validation stops improving; the best epoch's weights win.

        Raises:
            OutOfMemory: a batch does not fit even with gradient checkpointing.
        """
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        resumed = newest(self.checkpoints, asdict(self.recipe))
        probe = None if resumed else fit_probe(
            self.base, train, validation, "head", intercept=self.base.engine.head_has_bias,
            on_progress=lambda share, text: on_progress(0.1 * share, text),
        )  # fmt: skip
        torch.manual_seed(self.recipe.seed)
        backbone = self._load(len(train.labels), probe)
        run = _Run(_with_lora(backbone, self.recipe), backbone, self.recipe, train, validation, resumed)
        self._epochs(run, lambda share, text: on_progress(0.1 + 0.9 * share, text))
        run.load(run.best)
        truncated = int(run.encoded.truncated.sum() + run.encoded_validation.truncated.sum())
        return Trained(run.model, backbone, self.recipe, run.state, truncated, _peak_memory(self._device))

    def _load(self, n_labels: int, probe: Probe | None) -> Backbone:
        frozen = self.base.engine.backbone
        dtype = DTYPES[self.recipe.precision]
        backbone = load_backbone(frozen.source, device=self._device, dtype=dtype, num_labels=n_labels)
        # Layers the checkpoint lacks start random: the probe saw the engine's, so these must be the same.
        for name in backbone.fresh:
            backbone.model.get_submodule(name).load_state_dict(frozen.model.get_submodule(name).state_dict())
        if probe is not None:
            head = backbone.model.get_submodule(backbone.head_name)
            assert isinstance(head, nn.Linear)
            head.weight.data.copy_(torch.from_numpy(probe.weight))
            if head.bias is not None:
                head.bias.data.copy_(torch.from_numpy(probe.bias))
        return backbone

    def _epochs(self, run: "_Run", on_progress: OnProgress) -> None:
        state, epochs = run.state, self.recipe.epochs
        if state.epoch == 0 and not state.history:
            self._judge(run)
        while state.epoch < epochs and not self._out_of_patience(state):
            number = state.epoch + 1

            def step_done(step: int, steps: int, number: int = number) -> None:
                on_progress((number - 1 + step / steps) / epochs, f"epoch {number}/{epochs}, step {step}/{steps}")

            run.epoch(number, step_done, self._tell_loss)
            state.epoch = number
            self._judge(run)
            self.on_checkpoint(run.checkpoint().save(self.checkpoints))

    def _judge(self, run: "_Run") -> None:
        macro_f1, loss = run.validate()
        state = run.state
        state.history.append({"epoch": state.epoch, "validation_macro_f1": macro_f1, "validation_loss": loss})
        if run.last_train_loss is not None:
            state.history[-1]["train_loss"] = run.last_train_loss
        if (macro_f1, -loss) > (state.best_macro_f1, -state.best_loss):
            state.best_epoch, state.best_macro_f1, state.best_loss = state.epoch, macro_f1, loss
            run.best = {name: tensor.clone() for name, tensor in run.average.items()}
        name = f"epoch {state.epoch}" if state.epoch else "before the first step"
        self.on_event("metric", f"{name}: validation macro-F1 {macro_f1:.4f}", _finite(state.history[-1]))

    def _tell_loss(self, epoch: float, loss: float, learning_rate: float) -> None:
        data = {"epoch": epoch, "train_loss": loss, "learning_rate": learning_rate}
        self.on_event("metric", f"epoch {epoch:.2f}: training loss {loss:.4f}", _finite(data))

    def _out_of_patience(self, state: TrainingState) -> bool:
        return 0 < self.recipe.patience <= state.epoch - state.best_epoch


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is no number any more, as a loss that diverged: JSON has no word for it."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


class _Run:
    """One training run: model, optimizer, rows, and where it stands."""

    def __init__(
        self, model: Any, backbone: Backbone, recipe: LoraRecipe, train: Rows, validation: Rows,
        resumed: Checkpoint | None,
    ) -> None:  # fmt: skip
        self.model, self.backbone, self.recipe = model, backbone, recipe
        self.train, self.validation = train, validation
        self.encoded = encode(backbone.tokenizer, train.texts, recipe.max_length)
        self.encoded_validation = encode(backbone.tokenizer, validation.texts, recipe.max_length)
        self.lengths = self.encoded.lengths
        self.targets = torch.from_numpy(train.label_ids).to(backbone.device)
        self.loss = nn.CrossEntropyLoss(
            weight=_balanced_weights(train, backbone.device) if recipe.balanced else None,
            label_smoothing=LABEL_SMOOTHING,
        )
        self.steps_per_epoch = math.ceil(len(train.texts) / recipe.batch_size)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY,
            fused=backbone.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.last_train_loss: float | None = None
        self.state = resumed.state if resumed else TrainingState(asdict(recipe))
        self.best = resumed.best if resumed else self.weights()
        average = resumed.average if resumed else self.weights()
        self.average = {name: average[name].to(backbone.device) for name in self.trainable}
        if resumed:
            self.load(resumed.weights)
            restore_optimizer(self.optimizer, resumed.optimizer)
        if recipe.gradient_checkpointing or self.state.gradient_checkpointing:
            self.checkpoint_activations()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone().contiguous() for name, p in self.trainable.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.trainable.items():
            parameter.data.copy_(weights[name])

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.state, self.weights(), self.average, self.best, optimizer_tensors(self.optimizer))

    def checkpoint_activations(self) -> None:
        self.state.gradient_checkpointing = True
        # The frozen embeddings give no gradient, and a checkpointed block without one on its input trains nothing.
        self.model.enable_input_require_grads()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def epoch(self, number: int, on_step: Callable[[int, int], None], on_loss: OnLoss) -> None:
        """One pass over the train rows; order and dropout depend on seed and epoch alone, so resuming repeats them.

        Args:
            number: The epoch's, from 1 on.
            on_step: Gets the steps done, and those of an epoch.
            on_loss: Gets the epochs done, the mean loss since the last call, and the learning rate.
        """
        torch.manual_seed(self.recipe.seed * 1000 + number)
        rng = np.random.default_rng([self.recipe.seed, number])
        self.model.train()
        start, total = time.perf_counter(), torch.zeros((), device=self.backbone.device)
        every = max(1, self.steps_per_epoch * self.recipe.epochs // LOSS_EVENTS)
        recent, told = torch.zeros_like(total), 0
        for step, rows in enumerate(epoch_batches(self.lengths, self.recipe.batch_size, rng), 1):
            steps_done = (number - 1) * self.steps_per_epoch + step
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(steps_done)
            loss = self._fitting_step(rows)
            total, recent = total + loss, recent + loss
            self._add_to_average(steps_done)
            on_step(step, self.steps_per_epoch)
            if step - told >= every or step == self.steps_per_epoch:
                # Read from the device now and then only: each time waits for all work sent to it.
                mean = float(recent) / (step - told)
                on_loss(steps_done / self.steps_per_epoch, mean, self._learning_rate(steps_done))
                recent, told = torch.zeros_like(total), step
        self.last_train_loss = float(total) / self.steps_per_epoch
        self.state.train_seconds += time.perf_counter() - start
        self.state.train_tokens += int(self.lengths.sum())

    def validate(self) -> tuple[float, float]:
        """Macro-F1 over all labels and mean cross-entropy of the averaged weights, on the validation rows."""
        from sklearn.metrics import f1_score

        last = self.weights()
        self.load(self.average)
        logits = torch.from_numpy(_logits(self.model, self.backbone, self.encoded_validation))
        self.load(last)
        true = self.validation.label_ids
        loss = float(nn.functional.cross_entropy(logits, torch.from_numpy(true)))
        labels = range(len(self.train.labels))
        macro = f1_score(true, logits.argmax(1).numpy(), labels=labels, average="macro", zero_division=0)
        return float(macro), loss

    def _add_to_average(self, steps_done: int) -> None:
        decay = min(AVERAGE_DECAY, (1 + steps_done) / (10 + steps_done))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.average.values()), [p.detach() for p in self.trainable.values()], None)

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        steps = self.steps_per_epoch * self.recipe.epochs
        warmup = max(1, round(WARMUP * steps))
        if step <= warmup:
            return self.recipe.learning_rate * step / warmup
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    def _fitting_step(self, rows: NDArray[np.int64]) -> Tensor:
        try:
            return self._step(rows)
        except torch.OutOfMemoryError as error:
            if self.state.gradient_checkpointing or self.recipe.gradient_checkpointing is False:
                longest = int(self.lengths[rows].max())
                raise OutOfMemory(
                    f"A batch of {len(rows)} texts of up to {longest} tokens does not fit into the GPU's memory.",
                    hint="Lower train.batch_size or train.max_length, or let gradient_checkpointing be 'auto'.",
                ) from error
        torch.cuda.empty_cache()
        self.checkpoint_activations()
        return self._fitting_step(rows)

    def _step(self, rows: NDArray[np.int64]) -> Tensor:
        inputs = self.backbone.inputs([self.encoded.ids[i] for i in rows])
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.loss(self.model(**inputs).logits.float(), self.targets[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trainable.values(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        return loss.detach()


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


def _with_lora(backbone: Backbone, recipe: LoraRecipe) -> Any:
    """The PEFT model: LoRA and head in float32 whatever the base's precision, so that small updates are not lost."""
    from peft import LoraConfig, TaskType, get_peft_model

    # PEFT adds "classifier" and "score" itself; it matches by the end of the name.
    fresh = [name for name in backbone.fresh if "classifier" not in name]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout,
        target_modules=backbone.attention_projections(), modules_to_save=fresh or None,
    )  # fmt: skip
    model = get_peft_model(backbone.model, config, autocast_adapter_dtype=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad and ".lora_" not in name:
            module.float().register_forward_pre_hook(_cast_input)
    return model


def _cast_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (inputs[0].to(weight.dtype), *inputs[1:])


@torch.inference_mode()
def _logits(model: Any, backbone: Backbone, encoded: Encoded) -> NDArray[np.float32]:
    model.eval()
    logits: NDArray[np.float32] | None = None
    for rows in token_batches(encoded.lengths, TOKEN_BUDGET.get(backbone.device.type, 4096), 256):
        batch = model(**backbone.inputs([encoded.ids[i] for i in rows])).logits.float().cpu().numpy()
        if logits is None:
            logits = np.empty((len(encoded.ids), batch.shape[1]), dtype=np.float32)
        logits[rows] = batch
    assert logits is not None  # there is at least one row
    return logits


def _balanced_weights(train: Rows, device: torch.device) -> Tensor:
    """`(K,)`, inverse to the label's frequency, mean 1 over the rows; 0 where train has none."""
    counts = np.bincount(train.label_ids, minlength=len(train.labels))
    present = (counts > 0).sum()
    weights = np.divide(len(train.texts), present * counts, out=np.zeros(len(counts)), where=counts > 0)
    return torch.tensor(weights, dtype=torch.float32, device=device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, else the process's largest resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
