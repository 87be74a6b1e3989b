"""What one model adds to a base: LoRA pairs, layers the base lacks, and a head, read from a folder on disk."""

import json
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from service.core.errors import InvalidData
from service.ml.manifest import Manifest, States

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD = "head.safetensors"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Linear:
    """`weight` (out, in) and `bias` (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Linear":
        return Linear(self.weight.to(device, dtype), None if self.bias is None else self.bias.to(device, dtype))


@dataclass(frozen=True)
class Layout:
    """Which layers an adapter wraps; adapters of one layout can stand stacked in one tensor.

    Args:
        layers: By name, in order: the layer, its rank, its inputs, its outputs.
    """

    layers: tuple[tuple[str, int, int, int], ...]

    @cached_property
    def places(self) -> dict[str, tuple[int, int, int, int]]:
        """By layer: where its numbers begin, its rank, inputs, outputs."""
        places, start = {}, 0
        for name, rank, n_in, n_out in self.layers:
            places[name] = (start, rank, n_in, n_out)
            start += rank * (n_in + n_out)
        return places

    def pair(self, name: str, flat: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of N adapters' numbers `(N, F)` a layer's A^T `(N, in, r)` and B^T `(N, r, out)`; None if unwrapped."""
        if name not in self.places:
            return None
        start, rank, n_in, n_out = self.places[name]
        middle, stop = start + rank * n_in, start + rank * (n_in + n_out)
        return flat[:, start:middle].view(-1, n_in, rank), flat[:, middle:stop].view(-1, rank, n_out)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One model's own tensors; compared by identity.

    Args:
        labels: K labels in the order of their ids.
        head: (K, H), float32.
        states: What the head multiplies.
        max_length: Of a text, in tokens.
        lora: By layer, A (r, in) and B (out, r) with the scale folded into B. Taken over into `flat`.
        layers: By name, layers that take the place of the base's.
        temperature: What logits are divided by before they become probabilities.
        flat: (F,), all of `lora` in one tensor, as `layout` says.
        layout: Which layers stand in `flat`.
    """

    labels: tuple[str, ...]
    head: Linear
    states: States
    max_length: int
    lora: InitVar[Mapping[str, tuple[Tensor, Tensor]] | None] = None
    layers: dict[str, Linear] = field(default_factory=dict)
    temperature: float = 1.0
    flat: Tensor = field(default_factory=lambda: torch.empty(0))
    layout: Layout = Layout(())

    def __post_init__(self, lora: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        if lora:
            pairs = sorted(lora.items())
            layout = Layout(tuple((name, *a.shape, len(b)) for name, (a, b) in pairs))
            # As they are multiplied: batched products copy what stands the other way round.
            object.__setattr__(self, "flat", torch.cat([half.T.flatten() for _, pair in pairs for half in pair]))
            object.__setattr__(self, "layout", layout)

    @property
    def size_bytes(self) -> int:
        tensors = [self.flat]
        for linear in (self.head, *self.layers.values()):
            tensors += [t for t in (linear.weight, linear.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


def save_head(folder: Path, weight: Tensor, bias: Tensor) -> None:
    """A head on the frozen base, alone: what `embedding_logreg` is."""
    save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, folder / HEAD)


def load_adapter(folder: Path, *, head_name: str, device: torch.device, dtype: torch.dtype) -> Adapter:
    """Reads and checks a published folder: hashes, shapes, finite numbers.

    Args:
        folder: With `manifest.json`, and PEFT's two files or a head alone.
        head_name: The base's final layer, by which PEFT's file names the head.
        device: Where the tensors go.
        dtype: Of everything but the head, which stays float32: it is small and decides.

    Raises:
        InvalidData: a file is damaged, or its shapes do not fit together.
    """
    manifest = Manifest.read(folder, whole=False)
    read = partial(manifest.bytes_of, folder)
    lora, linears = _read_peft(read) if manifest.method == "lora" else ({}, _read_head(read, head_name))
    head = linears.pop(head_name, None)
    if head is None or head.weight.shape[0] != len(manifest.labels):
        raise InvalidData("The saved model's head does not have one row per label.")
    layers = {name: linear.to(device, dtype) for name, linear in linears.items()}
    read_in = Adapter(
        manifest.labels, head.to(device, torch.float32), manifest.states, manifest.max_length, lora, layers,
        manifest.temperature,
    )  # fmt: skip
    return replace(read_in, lora=None, flat=read_in.flat.to(device, dtype))  # in one piece: a layer's is soon sent


def _read_head(read: Callable[[str], bytes], head_name: str) -> dict[str, Linear]:
    head = _linear(_tensors(HEAD, read), "")
    if head.bias is None:
        raise InvalidData(f"{HEAD} of the saved model has no bias.")
    return {head_name: head}


def _read_peft(read: Callable[[str], bytes]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Linear]]:
    scale = _scale(read(CONFIG))
    tensors = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in _tensors(WEIGHTS, read).items()}
    lora: dict[str, tuple[Tensor, Tensor]] = {}
    linears: dict[str, Linear] = {}
    for name, tensor in tensors.items():
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            layer = name[: -len(".lora_A.weight")]
            if layer in lora:
                continue
            a, b = (tensors.get(f"{layer}.lora_{half}.weight", tensor[:0]) for half in "AB")
            if a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a):
                raise InvalidData(f"The saved adapter's two halves at {layer} do not fit together.")
            lora[layer] = (a, b * scale)
        elif name.endswith((".weight", ".bias")) and ".lora_" not in name:
            layer = name.rpartition(".")[0]
            linears[layer] = _linear(tensors, f"{layer}.")
        else:
            raise InvalidData(f"The saved adapter holds {name}, which this version cannot serve.")
    return lora, linears


def _scale(file: bytes) -> float:
    """The scale of a plain LoRA, alpha / r; what PEFT would compute otherwise is refused, not answered wrongly."""
    try:
        config = json.loads(file)
        scale = float(config["lora_alpha"]) / float(config["r"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InvalidData(f"{CONFIG} of the saved model is damaged.") from error
    other = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if other:
        raise InvalidData(f"{CONFIG} of the saved model asks for {', '.join(other)}, which this version cannot serve.")
    return scale


def _linear(tensors: dict[str, Tensor], prefix: str) -> Linear:
    weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise InvalidData(
            f"The saved model's layer {prefix or 'head'} is incomplete, or its parts do not fit together."
        )
    return Linear(weight, bias)


def _tensors(name: str, read: Callable[[str], bytes]) -> dict[str, Tensor]:
    try:
        tensors = {key: tensor.float() for key, tensor in load(read(name)).items()}
    except SafetensorError as error:
        raise InvalidData(f"{name} of the saved model is damaged.") from error
    if not all(np.isfinite(tensor.numpy()).all() for tensor in tensors.values()):  # a sixth of torch's time
        raise InvalidData(f"{name} of the saved model holds NaN or infinity.")
    return tensors
