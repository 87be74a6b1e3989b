"""A published LoRA model as one stock model: the adapter in the base's weights, the temperature in the head's."""

import re
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from service.core.errors import InvalidInput, RoundTripFailed
from service.ml.backbone import load_backbone
from service.ml.base_models import locate_at
from service.ml.manifest import Manifest

TOLERANCE = 1e-3
"""Relative error of the merged model's logits, in float32."""
_PROBES = ["a", "where is my parcel?", "Why, and when? " * 9, "cut off, as it is longer than what is read " * 200]
_LOCALLY = {"local_files_only": True, "trust_remote_code": False}


def merge(folder: Path, out: Path, models_dir: Path | None) -> None:
    """Writes a folder that stock transformers loads, with the answers of `/predict`: whole, or not at all.

    Args:
        folder: A published model.
        out: A folder that is not there yet.
        models_dir: Folder of allowed local base models.

    Raises:
        InvalidInput: the model has no stock form.
        InvalidData: its files are not the ones that were published.
        ModelUnavailable: its base cannot be had, or only at another revision.
        RoundTripFailed: what was written, loaded again, answers otherwise.
    """
    transformers_logging.set_verbosity_error()  # that a fresh head is missing from the checkpoint is no news
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    manifest = Manifest.read(folder)
    if manifest.method != "lora":
        raise InvalidInput(
            f"A model of method {manifest.method} is a head on embeddings: no stock class loads it, and there is "
            "nothing to merge. Export it with --format adapter, or export its job's lora model."
        )
    with TemporaryDirectory(dir=out.parent, prefix=".merging-") as place:
        made = Path(place, "model")
        expected = _write(folder, made, manifest, models_dir)
        model = AutoModelForSequenceClassification.from_pretrained(made, dtype=torch.float32, **_LOCALLY)
        error = float((_logits(model, made) - expected).norm() / expected.norm().clamp_min(1e-12))
        if not error <= TOLERANCE:
            raise RoundTripFailed(
                f"The merged model, loaded again, is {error:.3g} away from the adapter on its base (allowed: "
                f"{TOLERANCE:g}). Nothing was written."
            )
        made.rename(out)


def _write(folder: Path, made: Path, manifest: Manifest, models_dir: Path | None) -> Tensor:
    """The merged model in `made`; gives what it should answer to the probes, and lets go of the base."""
    source = locate_at(manifest.base_model, manifest.base_revision, models_dir)
    labels, cpu = dict(enumerate(manifest.labels)), torch.device("cpu")
    backbone = load_backbone(source, device=cpu, dtype=torch.float32, num_labels=len(labels))
    model: Any = PeftModel.from_pretrained(backbone.model, folder)
    expected = _logits(model, folder, manifest.max_length) / manifest.temperature
    model = model.merge_and_unload()
    for parameter in model.get_submodule(backbone.head_name).parameters():
        parameter.requires_grad_(False).div_(manifest.temperature)
    model.config.id2label, model.config.label2id = labels, {label: i for i, label in labels.items()}
    model.save_pretrained(made)
    for weights in made.glob("*.safetensors"):  # written for their owner's eyes alone
        weights.chmod((made / "config.json").stat().st_mode)
    tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCALLY)
    tokenizer.model_max_length = manifest.max_length  # where stock pipelines cut
    tokenizer.save_pretrained(made)
    if (folder / "README.md").is_file():  # older models have none
        card = ModelCard.load(folder / "README.md")
        card.data.library_name = "transformers"
        card.text = re.sub(r"(?s)### The adapter\n.*?(?=### Merged\n)", "", card.text, count=1)
        card.save(made / "README.md")
    return expected


@torch.inference_mode()
def _logits(model: Any, folder: Path, max_length: int | None = None) -> Tensor:
    """`(N, K)` of the probes by stock tools alone; cut at the tokenizer's own length where none is given."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCALLY)
    inputs = tokenizer(_PROBES, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    logits: Tensor = model.eval()(**inputs).logits
    return logits
