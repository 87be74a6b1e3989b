"""What one model adds to a base: LoRA pairs, layers the base lacks, and a head, read from a folder on disk."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file
from torch import Tensor

from service.core.errors import InvalidData
from service.ml.manifest import FILE as MANIFEST
from service.ml.manifest import Manifest, States

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD = "head.safetensors"
READ = frozenset({MANIFEST, CONFIG, WEIGHTS, HEAD})
"""Of a published folder's files those that `load_adapter` opens."""
_PEFT_PREFIX = "base_model.model."
Array = NDArray[np.float32]


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
        """By layer: which it is, its rank, inputs, outputs."""
        return {name: (i, rank, n_in, n_out) for i, (name, rank, n_in, n_out) in enumerate(self.layers)}

    @cached_property
    def sizes(self) -> list[int]:
        """How many numbers each layer has."""
        return [rank * (n_in + n_out) for _name, rank, n_in, n_out in self.layers]

    def pair(self, name: str, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor] | None:
        """Of N adapters' parts a layer's A^T `(N, in, r)` and B^T `(N, r, out)`; None if unwrapped."""
        if name not in self.places:
            return None
        i, rank, n_in, n_out = self.places[name]
        # Layer by layer: what is copied is small, and still in the processor's cache when it is multiplied.
        both = torch.stack([adapter[i] for adapter in parts]) if len(parts) > 1 else parts[0][i][None]
        return both[:, : rank * n_in].view(-1, n_in, rank), both[:, rank * n_in :].view(-1, rank, n_out)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One model's own tensors; compared by identity.

    Args:
        labels: K labels in the order of their ids.
        head: (K, H), float32.
        states: What the head multiplies.
        max_length: Of a text, in tokens.
        flat: (F,), A and B of every wrapped layer, the scale folded into B, in one tensor.
        layout: Which layers stand in `flat`.
        layers: By name, layers that take the place of the base's.
        temperature: What logits are divided by before they become probabilities.
    """

    labels: tuple[str, ...]
    head: Linear
    states: States
    max_length: int
    flat: Tensor = field(default_factory=lambda: torch.empty(0))
    layout: Layout = Layout(())
    layers: dict[str, Linear] = field(default_factory=dict)
    temperature: float = 1.0

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """`flat` by layer. Held, since a batch asks for all of them, and the other threads of a product wait for it."""
        return torch.split(self.flat, self.layout.sizes)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Adapter":
        """On a device, in the base's precision; the head stays float32: it is small and decides."""
        layers = {name: linear.to(device, dtype) for name, linear in self.layers.items()}
        return replace(self, head=self.head.to(device, torch.float32), flat=self.flat.to(device, dtype), layers=layers)

    @property
    def size_bytes(self) -> int:
        linears = (self.head, *self.layers.values())
        tensors = [self.flat, *(t for linear in linears for t in (linear.weight, linear.bias) if t is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)


def laid_flat(lora: Mapping[str, tuple[Array, Array]]) -> tuple[Tensor, Layout]:
    """By layer A (r, in) and B (out, r) as an adapter holds them: all numbers in a row, and which are whose."""
    if not lora:
        return torch.empty(0), Layout(())
    pairs = sorted(lora.items())
    # As they are multiplied: batched products copy what stands the other way round.
    flat = np.concatenate([half.T.ravel() for _name, pair in pairs for half in pair])
    return torch.from_numpy(flat), Layout(tuple((name, *a.shape, len(b)) for name, (a, b) in pairs))


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
        InvalidData: a file is missing or damaged, or its shapes do not fit together.
        OSError: the storage cannot be read at the moment.
    """
    manifest = Manifest.read(folder, whole=False)
    read = partial(manifest.bytes_of, folder)
    lora, linears = _read_peft(read) if manifest.method == "lora" else ({}, _read_head(read, head_name))
    head = linears.pop(head_name, None)
    if head is None or head.weight.shape[0] != len(manifest.labels):
        raise InvalidData("The saved model's head does not have one row per label.")
    flat, layout = laid_flat(lora)
    labels, states, longest = manifest.labels, manifest.states, manifest.max_length
    return Adapter(labels, head, states, longest, flat, layout, linears, manifest.temperature).to(device, dtype)


def _read_head(read: Callable[[str], bytes], head_name: str) -> dict[str, Linear]:
    head = _linear(_arrays(HEAD, read), "")
    if head.bias is None:
        raise InvalidData(f"{HEAD} of the saved model has no bias.")
    return {head_name: head}


def _read_peft(read: Callable[[str], bytes]) -> tuple[dict[str, tuple[Array, Array]], dict[str, Linear]]:
    scale = _scale(read(CONFIG))
    arrays = {name.removeprefix(_PEFT_PREFIX): array for name, array in _arrays(WEIGHTS, read).items()}
    lora: dict[str, tuple[Array, Array]] = {}
    linears: dict[str, Linear] = {}
    for name in arrays:
        layer = name.rpartition(".")[0]
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            layer = layer.rpartition(".")[0]
            if layer in lora:
                continue
            a, b = (arrays.get(f"{layer}.lora_{half}.weight", np.empty(0, np.float32)) for half in "AB")
            if a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a):
                raise InvalidData(f"The saved adapter's two halves at {layer} do not fit together.")
            lora[layer] = (a, b * scale)
        elif name.endswith((".weight", ".bias")) and ".lora_" not in name:
            linears[layer] = _linear(arrays, f"{layer}.")
        else:
            raise InvalidData(f"The saved adapter holds {name}, which this version cannot serve.")
    return lora, linears


def _scale(file: bytes) -> float:
    """The scale of a plain LoRA, alpha / r; what PEFT would compute otherwise is refused, not answered wrongly."""
    try:
        config = json.loads(file)
        scale = float(config["lora_alpha"]) / float(config["r"])
        if not math.isfinite(scale):
            raise ValueError("a scale is a number")
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise InvalidData(f"{CONFIG} of the saved model is damaged.") from error
    other = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if other:
        raise InvalidData(f"{CONFIG} of the saved model asks for {', '.join(other)}, which this version cannot serve.")
    return scale


def _linear(arrays: dict[str, Array], prefix: str) -> Linear:
    weight, bias = arrays.get(f"{prefix}weight"), arrays.get(f"{prefix}bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise InvalidData(f"The saved model's layer {prefix or 'head'} is incomplete, or its parts do not fit.")
    return Linear(torch.tensor(weight), None if bias is None else torch.tensor(bias))


def _arrays(name: str, read: Callable[[str], bytes]) -> dict[str, Array]:
    """Of a safetensors file, in numpy: torch gives up the interpreter at each of some hundred small steps, and the
    engine's own thread waits for it as often.
    """
    try:
        arrays = {key: _FLOATS[view["dtype"]](view["data"]).reshape(view["shape"])
                  for key, view in deserialize(read(name))}  # type: ignore[no-untyped-call]  # fmt: skip
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidData(f"{name} of the saved model is damaged, or holds other numbers than floats.") from error
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InvalidData(f"{name} of the saved model holds NaN or infinity.")
    return arrays


_FLOATS: dict[str, Callable[[bytes], Array]] = {
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype("<f4"),
    "BF16": lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4"),
}
