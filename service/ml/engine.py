"""Token batches x adapters -> logits: one copy of the base, any number of adapters in the same batch.

LoRA: y = W x + (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685). The rows of a batch stand grouped by adapter,
and each wrapped layer adds the product of each group's own A and B to that group's rows. Heads live outside the
model, so they may differ in their number of labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.core.errors import InvalidData
from service.ml.adapter import Adapter, Linear
from service.ml.backbone import Backbone, pool
from service.ml.encode import token_batches

TOKEN_BUDGET = {"cpu": 1024, "cuda": 16_384, "mps": 4096}
MAX_ROWS = 256

OnBatch = Callable[[int, int], None]
"""Called after every batch with the rows done and the rows in all."""


@dataclass
class _Route:
    """Which rows of the batch in flight belong to which adapter: `(start, stop, adapter)`."""

    segments: list[tuple[int, int, Adapter]] = field(default_factory=list)


class _AdaptedLinear(nn.Module):
    """A frozen linear layer that adds, or takes instead, what each row's adapter has for it."""

    def __init__(self, base: nn.Linear, name: str, route: _Route) -> None:
        super().__init__()
        self.base, self.name, self.route = base, name, route

    def forward(self, x: Tensor) -> Tensor:
        """`(B, …, in)` to `(B, …, out)`."""
        y: Tensor = self.base(x)
        for start, stop, adapter in self.route.segments:
            pair = adapter.lora.get(self.name)
            if pair is not None:
                y[start:stop] += (x[start:stop] @ pair[0].T) @ pair[1].T
            layer = adapter.layers.get(self.name)
            if layer is not None:
                y[start:stop] = nn.functional.linear(x[start:stop], layer.weight, layer.bias)
        return y


class Engine:
    """Scores texts on one base. Not for two threads at once."""

    def __init__(self, backbone: Backbone) -> None:
        """Takes the backbone over: its own head is cut off, so the stock model returns the states that head sees."""
        self.backbone = backbone
        self._route = _Route()
        self._hidden: Tensor | None = None
        self._wrapped: set[str] = set()
        head = _linear(backbone.model, backbone.head_name)
        self.head_width, self.head_has_bias = head.in_features, head.bias is not None
        _replace(backbone.model, backbone.head_name, nn.Identity())
        body = backbone.model.base_model
        assert isinstance(body, nn.Module)
        body.register_forward_hook(self._keep_hidden)

    def attach(self, adapter: Adapter) -> None:
        """Makes the base ready for an adapter; cheap, and only once per layer name.

        Raises:
            InvalidData: the adapter belongs to a base of another shape.
        """
        width = self.head_width if adapter.states == "head" else self.backbone.hidden_size
        if adapter.head.weight.shape[1] != width:
            raise InvalidData("The saved model's head does not fit the base model's states.")
        if adapter.states == "head" and not adapter.layers.keys() >= set(self.backbone.fresh):
            raise InvalidData("The saved adapter has no weights for layers that the base model's files lack.")
        shapes = [(name, (b.shape[0], a.shape[1])) for name, (a, b) in adapter.lora.items()]
        shapes += [(name, (x.weight.shape[0], x.weight.shape[1])) for name, x in adapter.layers.items()]
        layers = {name: _linear(self.backbone.model, name) for name, _ in shapes}
        for name, shape in shapes:
            if (layers[name].out_features, layers[name].in_features) != shape:
                raise InvalidData(f"The saved adapter does not fit the base model at {name}.")
        for name in layers.keys() - self._wrapped:
            _replace(self.backbone.model, name, _AdaptedLinear(layers[name], name, self._route))
            self._wrapped.add(name)

    def score(
        self, ids: Sequence[list[int]], adapters: Sequence[Adapter], on_batch: OnBatch | None = None
    ) -> list[NDArray[np.float32]]:
        """Logits of N texts, each under its own (attached) adapter.

        Args:
            ids: N lists of token ids.
            adapters: N adapters; each distinct one must have been attached.
            on_batch: Called after every batch.

        Returns:
            N arrays `(K_i,)`: heads may differ in their number of labels.
        """
        answers: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(ids)
        numbers = {id(adapter): i for i, adapter in enumerate(adapters)}
        for batch in self._batches(ids, on_batch):
            # Grouped by adapter, so that each group is one slice.
            rows = batch[np.argsort([numbers[id(adapters[i])] for i in batch], kind="stable")]
            segments = _segments([adapters[i] for i in rows])
            states = self._forward([ids[i] for i in rows], segments)
            for start, stop, adapter in segments:
                logits = _apply(adapter.head, states[adapter.states][start:stop]).cpu().numpy()
                for row, values in zip(rows[start:stop], logits, strict=True):
                    answers[row] = values
        return answers

    def states(self, ids: Sequence[list[int]], on_batch: OnBatch | None = None) -> dict[str, NDArray[np.float32]]:
        """States of N texts on the frozen base: `head` (N, H'), what the stock head sees; `pooled` (N, H)."""
        answers = {
            "head": np.empty((len(ids), self.head_width), dtype=np.float32),
            "pooled": np.empty((len(ids), self.backbone.hidden_size), dtype=np.float32),
        }
        for rows in self._batches(ids, on_batch):
            for kind, values in self._forward([ids[i] for i in rows], []).items():
                answers[kind][rows] = values.cpu().numpy()
        return answers

    def _batches(self, ids: Sequence[list[int]], on_batch: OnBatch | None) -> "_Batches":
        lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
        return _Batches(lengths, TOKEN_BUDGET.get(self.backbone.device.type, 4096), on_batch)

    @torch.inference_mode()
    def _forward(self, ids: Sequence[list[int]], segments: list[tuple[int, int, Adapter]]) -> dict[str, Tensor]:
        self._route.segments = segments
        try:
            inputs = self.backbone.inputs(ids)
            head_states = self.backbone.model(**inputs).logits.float()
            assert self._hidden is not None  # the hook has just set it
            pooled = pool(self._hidden, inputs, self.backbone.pooling, self.backbone.pad_id)
            return {"head": head_states, "pooled": pooled}
        finally:
            self._route.segments, self._hidden = [], None

    def _keep_hidden(self, _module: nn.Module, _inputs: object, output: object) -> None:
        self._hidden = output.last_hidden_state  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Batches:
    lengths: NDArray[np.int64]
    token_budget: int
    on_batch: OnBatch | None

    def __iter__(self):  # type: ignore[no-untyped-def]
        done = 0
        for rows in token_batches(self.lengths, self.token_budget, MAX_ROWS):
            yield rows
            done += len(rows)
            if self.on_batch is not None:
                self.on_batch(done, len(self.lengths))


def _apply(linear: Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, linear.weight, linear.bias)


def _segments(adapters: Sequence[Adapter]) -> list[tuple[int, int, Adapter]]:
    starts = [i for i in range(len(adapters)) if i == 0 or adapters[i] is not adapters[i - 1]]
    return [(start, stop, adapters[start]) for start, stop in zip(starts, [*starts[1:], len(adapters)], strict=True)]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise InvalidData(f"The saved adapter names a layer the base model lacks: {name}.") from error
    module = module.base if isinstance(module, _AdaptedLinear) else module
    if not isinstance(module, nn.Linear):
        raise InvalidData(f"The saved adapter names a layer that is not linear: {name}.")
    return module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
