"""Adapters made and asked by stock transformers and PEFT alone: what ours is compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.ml.manifest import Manifest

# By model type, written out by hand: the attention's projections, and the layers the tiny checkpoints lack.
TARGETS = {
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "bert": ["query", "key", "value", "attention.output.dense"],
    "roberta": ["query", "key", "value", "attention.output.dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin"],
}
LACKING = {"qwen3": None, "bert": None, "roberta": ["classifier"], "distilbert": ["pre_classifier", "classifier"]}


def labels(n: int) -> tuple[str, ...]:
    return tuple(f"label_{i:02d}" for i in range(n))


def manifest(n_labels: int, *, method: str = "lora", states: Any = "head", max_length: int = 32) -> Manifest:
    return Manifest(
        method=method, base_model="tiny", base_revision="sha256:0", labels=labels(n_labels), states=states,
        max_length=max_length, pad_token_id=0, ends_with_eos=False, seed=0, split={}, precision="fp32",
    )  # fmt: skip


def save_random_adapter(
    folder: Path, base: Path, tokenizer: Any, n_labels: int, *, seed: int = 0, rank: int = 4
) -> Path:
    """A LoRA adapter in which nothing is zero: B, the head and the fresh layers are all drawn at random."""
    torch.manual_seed(seed)
    model = stock_base(base, n_labels)
    kind = model.config.model_type
    config = LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=3 * rank, lora_dropout=0.1, target_modules=TARGETS[kind],
        modules_to_save=LACKING[kind],
    )  # fmt: skip
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    peft_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest(n_labels).write(folder)
    return folder


def stock_base(base: Path, n_labels: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=n_labels, dtype=torch.float32)


def stock_peft(base: Path, folder: Path, n_labels: int) -> Any:
    """As PEFT loads it for further training, without dropout."""
    model = stock_base(base, n_labels)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    return PeftModel.from_pretrained(model, folder, is_trainable=True).eval()


@torch.inference_mode()
def stock_logits(
    base: Path, folder: Path, texts: Sequence[str], n_labels: int, max_length: int = 32
) -> NDArray[np.float32]:
    """`(N, K)` in one padded batch, by the tokenizer saved beside the adapter: the README's recipe, word for word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = stock_base(base, n_labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(model, folder).eval()
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    batch.pop("token_type_ids", None)
    logits: NDArray[np.float32] = model(**batch).logits.numpy()
    return logits
