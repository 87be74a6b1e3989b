"""What training is compared with: the original notebook's recipe, and stock `Trainer` as an expert would set it.

Both are stock transformers and PEFT, and nothing of ours. The notebook's is as it was written (the arguments by the
names transformers 5 has for them): every text padded to 192 tokens, activation checkpointing, batches of 16, a random
head, bf16 by autocast, the base's own dropout, 2e-4 for 4 epochs. The expert's has batches of 32 of similar length,
padded to their longest, no checkpointing, no dropout in the base, nothing logged, saved or judged on the way, and of
bf16 weights, autocast and fp32, with SDPA or eager attention, what is fastest on the machine at hand: all six are
tried. The LoRA is the same: rank 16, alpha 32, dropout 0.05, on the attention's projections.

A figure is the time from the end of one step to the end of a later one, what comes before left out. The notebook's
steps are all alike. The expert's are as long as their texts are, so of two epochs the second is timed, whole.
"""

import itertools
import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging as transformers_logging

from _measures import Measure, parser, show, write

MAX_LENGTH, EPOCHS = 192, 4
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "banking77.csv"
_ATTENTION = {
    "bert": ["query", "key", "value", "attention.output.dense"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")


@dataclass(frozen=True)
class Reference:
    """A way to set stock `Trainer`.

    Args:
        precision: `autocast` to bf16 over the weights as transformers loads them, or weights of this type.
        attention: transformers' `attn_implementation`; None leaves the choice to it.
    """

    name: str
    batch: int
    padded: bool
    checkpointing: bool
    grouped: bool
    base_dropout: bool
    precision: Literal["autocast", "bf16", "fp32"] = "autocast"
    attention: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.precision}, {self.attention or 'stock'} attention"


NOTEBOOK = Reference("notebook", 16, padded=True, checkpointing=True, grouped=False, base_dropout=True)
TUNED = Reference("tuned_trainer", 32, padded=False, checkpointing=False, grouped=True, base_dropout=False)
WAYS = list(itertools.product(("bf16", "autocast", "fp32"), ("sdpa", "eager")))


@dataclass(frozen=True)
class Labelled:
    texts: Sequence[str]
    label_ids: Sequence[int]
    n_labels: int

    def first(self, n: int) -> "Labelled":
        return Labelled(self.texts[:n], self.label_ids[:n], self.n_labels)


def read(file: Path) -> Labelled:
    """Of a CSV with a header: texts in the first column, labels in the second."""
    import pandas as pd

    table = pd.read_csv(file).sample(frac=1, random_state=42)
    ids, names = pd.factorize(table.iloc[:, 1])
    return Labelled(table.iloc[:, 0].astype(str).tolist(), ids.tolist(), len(names))


class _Clock(TrainerCallback):
    """When two of the steps had ended."""

    def __init__(self, first: int, last: int) -> None:
        self.at = dict.fromkeys((first, last), math.nan)

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step in self.at:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.at[state.global_step] = time.perf_counter()


def seconds_per_row(
    how: Reference, base: Path, rows: Labelled, *, left_out: int, steps: int, device: str = "cpu"
) -> float:
    """Trains for `left_out` and then `steps` steps, and times the latter. SystemExit where nothing is learned from."""
    model, tokenizer = _model(how, base, rows.n_labels)
    padding = "max_length" if how.padded else False
    ids = tokenizer(list(rows.texts), padding=padding, truncation=True, max_length=MAX_LENGTH)
    data = [{k: ids[k][i] for k in ids} | {"labels": label} for i, label in enumerate(rows.label_ids)]
    clock = _Clock(left_out, left_out + steps)
    with tempfile.TemporaryDirectory(prefix="tuneproof-bench-") as folder:
        arguments = TrainingArguments(
            folder, max_steps=left_out + steps, per_device_train_batch_size=how.batch, learning_rate=2e-4,
            bf16=how.precision == "autocast", activation_checkpointing=how.checkpointing,
            train_sampling_strategy="group_by_length" if how.grouped else "random",
            optim="adamw_torch_fused", use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
            dataloader_drop_last=True, save_strategy="no", logging_strategy="no", logging_nan_inf_filter=False,
            report_to="none", disable_tqdm=True, label_names=["labels"], seed=42,
        )  # fmt: skip
        collate = default_data_collator if how.padded else DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, arguments, collate, data, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    moved = any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)
    if not (moved and math.isfinite(loss)):
        raise SystemExit(
            f"{how}: loss {loss}, LoRA {'' if moved else 'not '}moved: this is no training to compare with"
        )
    first, last = clock.at.values()
    return (last - first) / (steps * how.batch)


def _model(how: Reference, base: Path, n_labels: int) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = AutoConfig.from_pretrained(base, num_labels=n_labels)
    config.pad_token_id, config.use_cache = tokenizer.pad_token_id, False
    if not how.base_dropout:
        for name in _DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
    given: dict[str, Any] = {"attn_implementation": how.attention} if how.attention else {}
    if how.precision != "autocast":
        given["dtype"] = {"bf16": torch.bfloat16, "fp32": torch.float32}[how.precision]
    torch.manual_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, **given)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.05, target_modules=_ATTENTION[config.model_type]
    )
    return get_peft_model(model, lora), tokenizer


def notebook_seconds(base: Path, rows: Labelled, *, steps: int, device: str = "cpu") -> float:
    """A row's, of the notebook's recipe: three steps are left out."""
    return seconds_per_row(NOTEBOOK, base, rows.first(16 * (3 + steps)), left_out=3, steps=steps, device=device)


def tuned_seconds(how: Reference, base: Path, rows: Labelled) -> float:
    """A row's, of the second of two epochs over these rows."""
    steps = len(rows.texts) // how.batch
    return seconds_per_row(how, base, rows, left_out=steps, steps=steps)


def fastest_tuned(base: Path, rows: Labelled) -> tuple[Reference, dict[str, float]]:
    """The expert's choice on this machine, and the rows per second of all that were tried."""
    ways = [replace(TUNED, precision=precision, attention=attention) for precision, attention in WAYS]
    rates = {how: 1 / tuned_seconds(how, base, rows) for how in ways}
    return max(rates, key=rates.__getitem__), {f"{how.precision} {how.attention}": r for how, r in rates.items()}


def required(file: Path) -> Path:
    """The file, or the end of the program with status 2, in words."""
    if not file.is_file():
        print(f"There is no {file}. Name a CSV of texts and labels with --data.", file=sys.stderr)
        raise SystemExit(2)
    return file


def main() -> None:
    from service.ml.base_models import EMBEDDED, find_base, locate

    asked = parser(__doc__)
    asked.add_argument("--data", type=Path, default=DATA, help="texts and labels; by default BANKING77")
    asked.add_argument("--only", choices=("notebook", "tuned_trainer"))
    asked.add_argument("--rounds", type=int)
    given = asked.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    base, rows = locate(find_base(EMBEDDED, None)).folder, read(required(given.data))
    rounds, steps, n_rows = (given.rounds or 1, 2, 64) if given.quick else (given.rounds or 3, 9, 1600)
    measures, tried = [], {}
    if given.only != "tuned_trainer":
        taken = [notebook_seconds(base, rows, steps=steps) for _ in range(rounds)]
        measures += [
            Measure("notebook_seconds_per_row", taken),
            Measure("notebook_rows_per_second", [1 / one for one in taken]),
            # Before anything else runs in this process.
            Measure("notebook_peak_memory_bytes", [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0]),
        ]
    if given.only != "notebook":
        how, tried = fastest_tuned(base, rows.first(n_rows // 2))
        rates = [1 / tuned_seconds(how, base, rows.first(n_rows)) for _ in range(rounds)]
        measures.append(Measure("tuned_trainer_rows_per_second", rates))
        print(f"{how} was the fastest; rows/s of those tried:", {name: round(rate, 1) for name, rate in tried.items()})
    show(f"Stock Trainer and PEFT on MiniLM, {torch.get_num_threads()} threads", measures)
    write(given.json, measures, device="cpu", threads=torch.get_num_threads(), tried=tried)


if __name__ == "__main__":
    main()
