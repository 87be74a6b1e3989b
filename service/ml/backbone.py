"""A base model with its stock sequence-classification head, loaded one way for training and for serving."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from service.core.errors import ModelUnavailable
from service.ml.base_models import Located
from service.ml.encode import Tokenizer, load_tokenizer

Pooling = Literal["mean", "cls", "last"]
_ATTENTION = {"attention", "attn", "self_attn", "self_attention"}
WRAPPED = "base"
"""Under this name the engine's wrapper of a layer holds the base's own."""


@dataclass
class Backbone:
    """A stock `AutoModelForSequenceClassification` and what is known about it.

    Args:
        model: On its device, in eval mode, every weight frozen, every dropout of the base at 0.
        tokenizer: As `load_tokenizer` makes it.
        decoder: Whether it reads left to right (and pools its last token).
        head_name: Name of the final linear layer, the one with an output per label.
        fresh: Names of the other linear layers that the checkpoint lacks (DistilBERT's `pre_classifier`). They start
            random, so they are trained and saved with the adapter.
        pooling: How the model's own makers pool its states into one vector.
        source: Which files it came from.
    """

    model: nn.Module
    tokenizer: Tokenizer
    decoder: bool
    head_name: str
    fresh: tuple[str, ...]
    pooling: Pooling
    source: Located

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def hidden_size(self) -> int:
        config: Any = self.model.config
        return int(config.hidden_size)

    def attention_layers(self) -> dict[str, nn.Linear]:
        """The attention's linear layers by name, whether an engine has wrapped them or not.

        Raises:
            ModelUnavailable: the architecture's attention has no linear layers (GPT-2 has convolutions).
        """
        layers = {
            name.removesuffix(f".{WRAPPED}"): module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and _ATTENTION.intersection(name.split("."))
        }
        if not layers:
            raise ModelUnavailable(
                f"Base model {self.source.base.name!r} cannot be fine-tuned: its attention has no linear layers.",
                hint="Use another base model, or a baseline job on this one.",
            )
        return layers

    def attention_projections(self) -> list[str]:
        """Their names from the block on: `self_attn.q_proj`, `attention.self.query`. Raises ModelUnavailable."""
        parts = [name.split(".") for name in self.attention_layers()]
        starts = [next(i for i, part in enumerate(name) if part in _ATTENTION) for name in parts]
        return sorted({".".join(name[start:]) for name, start in zip(parts, starts, strict=True)})

    def inputs(self, ids: Sequence[list[int]]) -> dict[str, Tensor]:
        """`(B, L)` right-padded input ids and, for encoders, the attention mask.

        A right-padded causal model needs no mask: no real token can see the padding after it.
        """
        longest = max(len(row) for row in ids)
        padded = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in ids])
        inputs = {"input_ids": padded.to(self.device)}
        if not self.decoder:
            lengths = torch.tensor([len(row) for row in ids])
            inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long().to(self.device)
        return inputs


def load_backbone(
    source: Located, *, device: torch.device, dtype: torch.dtype, num_labels: int = 2, attention: str | None = None
) -> Backbone:
    """Loads a base model with a fresh stock head of `num_labels` outputs.

    Args:
        source: Where the files lie.
        device: Where to put it.
        dtype: Of all its weights; transformers 5 would take the checkpoint's.
        num_labels: Rows of the head.
        attention: transformers' `attn_implementation`; by default `eager` on a CPU, where SDPA with a mask is slow
            for short texts, and `sdpa` elsewhere.

    Raises:
        ModelUnavailable: the files are damaged, or of an architecture without a stock head or a tokenizer.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False, num_labels=num_labels
        )
        _without_dropout(config)
        decoder = is_decoder(config)
        tokenizer = load_tokenizer(source.folder, decoder=decoder)
        config.pad_token_id = tokenizer.pad_token_id
        config.use_cache = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # layers that the checkpoint lacks start the same in every process
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                source.folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=attention or ("eager" if device.type == "cpu" else "sdpa"),
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:
        raise ModelUnavailable(
            f"Base model {source.base.name!r} cannot be loaded ({type(error).__name__}).",
            hint="Its folder needs a config.json of an architecture that transformers can classify with, undamaged "
            "safetensors and a fast tokenizer.",
        ) from error
    head_name = _final_linear(model, num_labels)
    fresh = _fresh_layers(model, loading["missing_keys"], head_name, source.base.name)
    _refuse_broken_weights(model, source.base.name)
    model = model.to(device).eval().requires_grad_(False)
    return Backbone(model, tokenizer, decoder, head_name, fresh, _own_pooling(source.folder, decoder), source)


def is_decoder(config: Any) -> bool:
    """Whether the architecture reads left to right: it is made for generation, and not for filling in masked words."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return config.model_type in CAUSAL and config.model_type not in MASKED


def _without_dropout(config: Any) -> None:
    # The frozen base is a feature extractor; its dropout slows a step by a third and regularises nothing that trains.
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def _final_linear(model: Any, num_labels: int) -> str:
    body = f"{model.base_model_prefix}."
    names: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_labels and not name.startswith(body)
    ]
    if not names:
        raise ModelUnavailable("The base model's stock classification head has no final linear layer.")
    return names[-1]


def _fresh_layers(model: nn.Module, missing: set[str], head_name: str, base_name: str) -> tuple[str, ...]:
    layers = {key.rpartition(".")[0] for key in missing} - {head_name}
    # Within the body only a pooler may be lacking (a BERT saved for masked words has none); all else is damage.
    body = f"{model.base_model_prefix}."
    wrong = sorted(
        layer
        for layer in layers
        if not isinstance(model.get_submodule(layer), nn.Linear) or (layer.startswith(body) and "pooler" not in layer)
    )
    if wrong:
        raise ModelUnavailable(
            f"The weights of base model {base_name!r} lack {', '.join(wrong[:5])}.",
            hint="The folder's safetensors are incomplete, or belong to another architecture than its config.json.",
        )
    return tuple(sorted(layers))


def _refuse_broken_weights(model: nn.Module, base_name: str) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ModelUnavailable(f"The weights of base model {base_name!r} hold NaN or infinity.", hint="Get them anew.")


def _own_pooling(folder: Path, decoder: bool) -> Pooling:
    """As the sentence-transformers file beside the weights says; without one, mean for encoders, last for decoders."""
    if decoder:
        return "last"
    file = folder / "1_Pooling" / "config.json"
    says_cls = file.is_file() and json.loads(file.read_text()).get("pooling_mode_cls_token")
    return "cls" if says_cls else "mean"
