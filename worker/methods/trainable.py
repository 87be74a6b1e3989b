"""What a fine-tune moves: LoRA pairs, layers the base lacks, and the head, in float32 whatever the base's precision.

The frozen model runs in the engine, as it does in serving; here is what its wrapped layers compute meanwhile.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from service.core.errors import ModelUnavailable
from service.ml.adapter import CONFIG, WEIGHTS, Adapter, Layout, Linear
from service.ml.backbone import WRAPPED, Backbone
from service.ml.encode import encode
from service.ml.engine import Engine
from worker.methods.frozen import Probe

Weights = dict[str, Tensor]
LORA = "lora"
_PEFTS_OWN = ("classifier", "score")  # it trains and saves modules of these names whatever it is told
_SHIFT = 1021  # a prime: no two products drop the same places


@dataclass
class _AtHand:
    """Of the rows being computed: LoRA by layer in the base's precision, and what dropout keeps."""

    parts: tuple[Tensor, ...] = ()
    kept: Tensor | None = None
    positions: tuple[int, int] = (0, 0)
    """How many tokens there are, end to end and padded."""
    read: Tensor | None = None
    ahead: dict[str, Tensor] = field(default_factory=dict)
    """What layers that read the same, `read`, have been computed to."""


@dataclass(frozen=True)
class _Together:
    """Layers that read the same, as one product: `weight` (sum of their outputs, in), `bias` or None."""

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor | None
    widths: list[int]

    @classmethod
    def of(cls, layers: Mapping[str, nn.Linear]) -> "_Together":
        """The layers' own weights become views of these: nothing is held twice."""
        widths = [layer.out_features for layer in layers.values()]
        weight, biases = torch.cat([layer.weight.data for layer in layers.values()]), []
        for layer, own in zip(layers.values(), torch.split(weight, widths), strict=True):
            layer.weight.data = own
            if layer.bias is not None:
                biases.append(layer.bias.data)
        return cls(tuple(layers), weight, torch.cat(biases) if biases else None, widths)


@dataclass
class Trainable:
    """The numbers of one fine-tune on an engine.

    Args:
        engine: Of the base, which it uses alone while it trains.
        layout: The layers with LoRA.
        scale: alpha / r.
        dropout: Share of a LoRA's input that is dropped in training.
        weights: `lora` (F,), laid out as an adapter's; and by name the weights of the stock head and of layers that
            the base's files lack.
    """

    engine: Engine
    layout: Layout
    scale: float
    dropout: float
    weights: Weights
    _scales: Tensor = field(init=False)
    _at_hand: _AtHand = field(init=False, default_factory=_AtHand)
    _together: dict[str, _Together] = field(init=False)
    """By the first of the layers."""

    def __post_init__(self) -> None:
        halves = [torch.tensor([1.0, self.scale]).repeat_interleave(torch.tensor([rank * n_in, rank * n_out]))
                  for _name, rank, n_in, n_out in self.layout.layers]  # fmt: skip
        device = self.engine.backbone.device
        self._scales = torch.cat(halves).to(device)
        for tensor in self.weights.values():
            tensor.requires_grad_()
        self.engine.attach(self.adapter(self.weights, ()))
        groups = {tuple(layers): layers for layers in self._readers()}
        if sum(map(len, groups)) > len(self.layout.layers):  # one reads now with these, now with those
            groups = {(name,): {name: layer} for layers in groups.values() for name, layer in layers.items()}
        self._together = {names[0]: _Together.of(layers) for names, layers in groups.items()}

    def _readers(self) -> list[dict[str, nn.Linear]]:
        """The wrapped layers, by what they are seen to read."""
        found: list[dict[str, nn.Linear]] = []
        before: Tensor | None = None

        def notice(name: str, base: nn.Linear, x: Tensor) -> Tensor:
            nonlocal before
            if name in self.layout.places:
                if before is not x or (base.bias is None) != (next(iter(found[-1].values())).bias is None):
                    found.append({})
                before = x
                found[-1][name] = base
            y: Tensor = base(x)
            return y

        ids = encode(self.engine.backbone.tokenizer, ["a"], 8).ids
        with torch.no_grad(), self.engine.changed(notice):
            self.engine.head_states(ids)
        return found

    @classmethod
    def start(
        cls, engine: Engine, rank: int, alpha: int, dropout: float, n_labels: int, probe: Probe | None, seed: int
    ) -> "Trainable":
        """A at random (He et al. 2015, as PEFT has it), B zero, the head as the probe has it, else zero."""
        backbone, generator = engine.backbone, torch.Generator().manual_seed(seed)
        layout = lora_layout(backbone, rank)
        pieces = []
        for _name, r, n_in, n_out in layout.layers:
            down = torch.empty(r * n_in).uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
            pieces += [down, torch.zeros(r * n_out)]
        head = {"weight": torch.zeros(n_labels, engine.head_width)}
        if engine.head_has_bias:
            head["bias"] = torch.zeros(n_labels)
        if probe is not None:
            head = {part: torch.from_numpy(getattr(probe, part)) for part in head}
        weights = {LORA: torch.cat(pieces)} | {f"{backbone.head_name}.{part}": value for part, value in head.items()}
        for name in backbone.fresh:
            layer = backbone.model.get_submodule(name)
            layer = getattr(layer, WRAPPED, layer)
            weights |= {f"{name}.{part}": p.detach().float() for part, p in layer.named_parameters()}
        weights = {name: tensor.to(backbone.device).clone() for name, tensor in weights.items()}
        return cls(engine, layout, alpha / rank, dropout, weights)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.weights.items():
            parameter.data.copy_(weights[name])

    def logits(self, ids: list[list[int]], generator: torch.Generator | None = None) -> Tensor:
        """`(B, K)` of B texts, shortest first, with gradients; inside `engine.changed(self.change)`.

        One draw of dropout serves a batch: each layer reads it from another place on.
        """
        base: Any = self.engine.backbone.model
        dtype = base.dtype
        self._at_hand.parts = torch.split((self.weights[LORA] * self._scales).to(dtype), self.layout.sizes)
        self._at_hand.kept, self._at_hand.positions = None, (sum(map(len, ids)), len(ids) * len(ids[-1]))
        if generator is not None and self.dropout:
            widest = max(n_in for _name, _rank, n_in, _n_out in self.layout.layers)
            # Room for the rows padded to the longest, and for each layer's own place to begin.
            size = len(ids) * len(ids[-1]) * widest + _SHIFT * len(self.layout.layers)
            drawn = torch.empty(size, dtype=dtype, device=self.engine.backbone.device)
            self._at_hand.kept = drawn.bernoulli_(1 - self.dropout, generator=generator).div_(1 - self.dropout)
        states = self.engine.head_states(ids)
        return self._linear(self.engine.backbone.head_name, states)

    def let_go(self) -> None:
        """Of what the last rows left behind; after an error that is all of their activations."""
        self._at_hand = _AtHand()

    def change(self, name: str, base: nn.Linear, x: Tensor) -> Tensor:
        """What a wrapped layer computes in training."""
        if name not in self.layout.places:
            return self._linear(name, x.float()).to(x.dtype)
        if self._at_hand.read is x and name in self._at_hand.ahead:
            return self._at_hand.ahead.pop(name)
        flat = x.flatten(0, -2)
        if len(flat) not in self._at_hand.positions:
            raise ModelUnavailable(
                f"The base model cannot be fine-tuned: {name} reads something else than the tokens of a text.",
                hint="Use another base model, or a baseline job on this one.",
            )
        read, i = flat, self.layout.places[name][0]
        if self._at_hand.kept is not None:
            read = flat * self._at_hand.kept[_SHIFT * i :][: flat.numel()].view_as(flat)
        together = self._together[name]
        downs, ups = zip(*map(self._pair, together.names), strict=True)
        down, up = torch.cat(downs, 1), torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        # In the base's precision: PEFT keeps a float32 copy of every layer's input.
        y = linear(flat, together.weight, together.bias).addmm_(read @ down, up)
        # What is cut off may be written to, as Longformer's attention does.
        cut = torch.unsafe_split_with_sizes(y.view(*x.shape[:-1], -1), together.widths, -1)
        outputs = dict(zip(together.names, cut, strict=True))
        self._at_hand.read, self._at_hand.ahead = x, outputs
        return outputs.pop(name)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        i, rank, n_in, n_out = self.layout.places[name]
        part = self._at_hand.parts[i]
        return part[: rank * n_in].view(n_in, rank), part[rank * n_in :].view(rank, n_out)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def adapter(self, weights: Mapping[str, Tensor], labels: tuple[str, ...], max_length: int = 0) -> Adapter:
        """As serving holds it, of these weights."""
        held, backbone = {name: tensor.detach() for name, tensor in weights.items()}, self.engine.backbone
        head, *fresh = (Linear(held[f"{name}.weight"], held.get(f"{name}.bias"))
                        for name in (backbone.head_name, *backbone.fresh))  # fmt: skip
        linears = dict(zip(backbone.fresh, fresh, strict=True))
        base: Any = self.engine.backbone.model
        made = Adapter(labels, head, "head", max_length, held[LORA] * self._scales, self.layout, linears)
        return made.to(self.engine.backbone.device, base.dtype)

    def save(self, folder: Path, weights: Mapping[str, Tensor], alpha: int) -> None:
        """PEFT's two files and the tokenizer: what stock PEFT needs on the stock base model."""
        from peft import LoraConfig, TaskType

        backbone, base = self.engine.backbone, self.engine.backbone.source.base
        rank = self.layout.layers[0][1]
        heads = [name for name in (*backbone.fresh, backbone.head_name) if name.split(".")[0] not in _PEFTS_OWN]
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=alpha, lora_dropout=self.dropout, inference_mode=True,
            modules_to_save=[*heads, *_PEFTS_OWN], base_model_name_or_path=base.repo or base.name,
            revision=backbone.source.revision,
        )  # fmt: skip
        # Written here: PEFT makes a set of the targets, which stands in another order in every process.
        written = config.to_dict() | {"target_modules": backbone.attention_projections()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor for name, tensor in weights.items() if name != LORA}
        parts = torch.split(weights[LORA], self.layout.sizes)
        for (name, r, n_in, n_out), numbers in zip(self.layout.layers, parts, strict=True):
            tensors[f"{name}.lora_A.weight"] = numbers[: r * n_in].view(n_in, r).t()
            tensors[f"{name}.lora_B.weight"] = numbers[r * n_in :].view(r, n_out).t()
        named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
        backbone.tokenizer.save_pretrained(folder)


def lora_layout(backbone: Backbone, rank: int) -> Layout:
    """LoRA of one rank on the linear layers of the base's attention. Raises ModelUnavailable."""
    layers = sorted(backbone.attention_layers().items())
    return Layout(tuple((name, rank, layer.in_features, layer.out_features) for name, layer in layers))
