"""Token batches x adapters -> logits: one copy of the base, any number of adapters in the same batch.

The rows of a batch are laid end to end (`packed`), each wrapped layer adds what its rows' adapters have for it
(`mixture`), and heads live outside the model, so they may differ in their number of labels.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.core.errors import InvalidData
from service.ml import packed
from service.ml.adapter import Adapter
from service.ml.backbone import Backbone, Pooling
from service.ml.encode import encode, token_batches
from service.ml.mixture import Mixture
from service.ml.packed import Kernel, NotPacked, Rows

TOKEN_BUDGET = {"cpu": 2048, "cuda": 16_384, "mps": 4096}
"""Tokens of a batch by kind of device; where rows are padded, padding counts."""
MAX_ROWS = 256
# How far rows laid end to end may stand from the stock model's padded ones, relative, before the base is padded too.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_PROBES = ("a", "b", "a longer text than those", "why, and when, and where was it that these two were as long?")

OnBatch = Callable[[int, int], None]
"""Called after every batch with the rows done and the rows in all."""
Change = Callable[[str, nn.Linear, Tensor], Tensor]
"""Computes a wrapped layer: its name, the base's own, `(…, in)`; gives `(…, out)`."""

log = logging.getLogger("tuneproof.engine")


class _Flight:
    """The batch that the model is computing."""

    rows: Rows | None = None
    mixture: Mixture | None = None
    hidden: Tensor | None = None
    change: Change | None = None


class _AdaptedLinear(nn.Module):
    """A frozen linear layer that adds, or takes instead, what each row's adapter has for it."""

    def __init__(self, base: nn.Linear, name: str, flight: _Flight) -> None:
        super().__init__()
        self.base, self.name, self.flight = base, name, flight

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`."""
        if self.flight.change is not None:
            return self.flight.change(self.name, self.base, x)
        y: Tensor = self.base(x)
        mixture = self.flight.mixture
        if mixture is None:
            return y
        for share in mixture.shares:
            share.add(self.name, x, y.flatten(0, -2))
        for adapter, rows in mixture.rows_of:
            layer = adapter.layers.get(self.name)
            if layer is not None:
                if len(x) != mixture.n_rows:
                    raise NotPacked  # it reads tokens, and these stand end to end
                y[rows] = nn.functional.linear(x[rows], layer.weight, layer.bias)
        return y


@dataclass(frozen=True)
class _States:
    """Of B rows `head` (B, H'), what the stock head sees, and all there is to pool them by."""

    head: Tensor
    hidden: Tensor
    rows: Rows
    last: Tensor
    pooling: Pooling

    @cached_property
    def pooled(self) -> Tensor:
        return _pool(self.hidden, self.rows, self.last, self.pooling)

    def of(self, kind: str) -> Tensor:
        """What a head on states of this kind multiplies, float32."""
        return self.head if kind == "head" else self.pooled


class Engine:
    """Scores texts on one base. Not for two threads at once."""

    def __init__(self, backbone: Backbone) -> None:
        """Takes the backbone over: its own head is cut off, so the stock model returns the states that head sees."""
        self.backbone = backbone
        self._flight = _Flight()
        self._wrapped: set[str] = set()
        self._fitting: set[object] = set()
        head = _linear(backbone.model, backbone.head_name)
        self.head_width, self.head_has_bias = head.in_features, head.bias is not None
        _replace(backbone.model, backbone.head_name, nn.Identity())
        body = backbone.model.base_model
        assert isinstance(body, nn.Module)
        self._body = body
        body.register_forward_hook(self._keep_hidden)
        pooler = getattr(body, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.register_forward_pre_hook(self._first_tokens)
        # BERT and its kin: the attention of the last block, residual and norm within.
        attentions = [m for name, m in body.named_modules() if name.endswith(".attention") and hasattr(m, "output")]
        for last in attentions[-1:]:
            last.register_forward_hook(_firsts_alone, with_kwargs=True)
        config: Any = backbone.model.config
        self._stock_attention: str = config._attn_implementation
        self._kernel = packed.kernel_for(backbone.device, next(backbone.model.parameters()).dtype)
        self._first_position, self._firsts_alone = 0, not backbone.decoder
        self._longest_packed = self._packing() if self._kernel is not None else 0.0

    def attach(self, adapter: Adapter) -> None:
        """Makes the base ready for an adapter; next to nothing for one that is shaped like one before.

        Raises:
            InvalidData: the adapter belongs to a base of another shape.
        """
        width = self.head_width if adapter.states == "head" else self.backbone.hidden_size
        if adapter.head.weight.shape[1] != width:
            raise InvalidData("The saved model's head does not fit the base model's states.")
        if adapter.states == "head" and not adapter.layers.keys() >= set(self.backbone.fresh):
            raise InvalidData("The saved adapter has no weights for layers that the base model's files lack.")
        instead = tuple((name, layer.weight.shape) for name, layer in adapter.layers.items())
        if (adapter.layout, instead) in self._fitting:
            return
        shapes = [(name, (n_out, n_in)) for name, _rank, n_in, n_out in adapter.layout.layers]
        for name, _ in shapes:
            if not _IN_A_BLOCK.search(name):
                raise InvalidData(f"The saved adapter adapts {name}, which is in none of the base model's blocks.")
        shapes += [(name, (shape[0], shape[1])) for name, shape in instead]
        layers = {name: _linear(self.backbone.model, name) for name, _ in shapes}
        for name, shape in shapes:
            if (layers[name].out_features, layers[name].in_features) != shape:
                raise InvalidData(f"The saved adapter does not fit the base model at {name}.")
        for name in layers.keys() - self._wrapped:
            _replace(self.backbone.model, name, _AdaptedLinear(layers[name], name, self._flight))
            self._wrapped.add(name)
        self._fitting.add((adapter.layout, instead))

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
        for batch in self._batches(ids, on_batch):
            states, mixture = self._forward([ids[i] for i in batch], [adapters[i] for i in batch])
            by_adapter = [
                nn.functional.linear(states.of(adapter.states)[rows], adapter.head.weight, adapter.head.bias)
                for adapter, rows in mixture.rows_of
            ]
            # Together, so that a GPU is waited for once.
            flat, start = torch.cat([logits.flatten() for logits in by_adapter]).cpu().numpy(), 0
            for (_adapter, rows), logits in zip(mixture.rows_of, by_adapter, strict=True):
                stop = start + logits.numel()
                for row, values in zip(rows.tolist(), flat[start:stop].reshape(logits.shape), strict=True):
                    answers[batch[row]] = values
                start = stop
        return answers

    def states(self, ids: Sequence[list[int]], on_batch: OnBatch | None = None) -> dict[str, NDArray[np.float32]]:
        """States of N texts on the frozen base: `head` (N, H'), what the stock head sees; `pooled` (N, H)."""
        answers = {
            "head": np.empty((len(ids), self.head_width), dtype=np.float32),
            "pooled": np.empty((len(ids), self.backbone.hidden_size), dtype=np.float32),
        }
        for batch in self._batches(ids, on_batch):
            states, _ = self._forward([ids[i] for i in batch], [])
            for kind, values in answers.items():
                values[batch] = states.of(kind).cpu().numpy()
        return answers

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """Until it ends, `change` computes the layers that were attached: training's own.

        Backward passes belong inside, since gradient checkpointing computes layers again.
        """
        self._flight.change = change
        try:
            yield
        finally:
            self._flight.change = None

    def head_states(self, ids: Sequence[list[int]]) -> Tensor:
        """`(B, H')` of B texts, shortest first: what the stock head sees, float32, with gradients."""
        kernel = self._kernel if len(ids[-1]) <= self._longest_packed else None
        return self._run(ids, [], kernel, training=True)[0].head

    def _batches(self, ids: Sequence[list[int]], on_batch: OnBatch | None) -> Iterator[NDArray[np.int64]]:
        """Positions of the rows, batch by batch, shortest first."""
        lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
        budget, done = TOKEN_BUDGET.get(self.backbone.device.type, 4096), 0
        for padded in (False, True):  # apart, so that one row that must be padded does not pad the others
            rows = np.flatnonzero((lengths > self._longest_packed) == padded)
            for batch in token_batches(lengths[rows], budget, MAX_ROWS, padded=padded):
                yield rows[batch]
                done += len(batch)
                if on_batch is not None:
                    on_batch(done, len(ids))

    @torch.inference_mode()
    def _forward(self, ids: Sequence[list[int]], adapters: Sequence[Adapter]) -> tuple[_States, Mixture]:
        """States of B rows, shortest first, each under its own adapter, or all on the bare base."""
        if len(ids[-1]) <= self._longest_packed:
            try:
                return self._run(ids, adapters, self._kernel)
            except NotPacked:
                log.debug("a batch is padded: an adapter's layers are not to be had without")
        return self._run(ids, adapters, None)

    def _run(
        self, ids: Sequence[list[int]], adapters: Sequence[Adapter], kernel: Kernel | None, *, training: bool = False
    ) -> tuple[_States, Mixture]:
        backbone, lengths = self.backbone, np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        model: Any = backbone.model
        if kernel is None:
            starts, inputs = np.arange(len(ids)) * lengths.max(), backbone.inputs(ids)
        else:
            starts, inputs = np.cumsum(lengths) - lengths, self._end_to_end(ids, lengths)
        rows = Rows(lengths, starts, backbone.device, kernel, training and self._firsts_alone)
        mixture = Mixture.of(adapters, rows)
        attention = self._stock_attention if kernel is None else packed.NAME
        self._attend_by(attention)
        more = {} if kernel is None else {"packed_rows": rows}
        self._flight.rows, self._flight.mixture = rows, mixture
        try:
            # A decoder's stock head finds a row's last token by the padding behind it, which may not be there.
            output = (self._body if backbone.decoder else model)(**inputs, **more)
            assert self._flight.hidden is not None  # the hook has just set it
            hidden = self._flight.hidden.flatten(0, 1)
        finally:
            self._flight.rows = self._flight.mixture = self._flight.hidden = None
        last = torch.from_numpy(starts + [self._last(row) for row in ids]).to(backbone.device)
        head = hidden[last] if backbone.decoder else output.logits
        return _States(head.float(), hidden, rows, last, backbone.pooling), mixture

    def _attend_by(self, name: str) -> None:
        model: Any = self.backbone.model
        if model.config._attn_implementation != name:
            model.set_attn_implementation(name)

    def _end_to_end(self, ids: Sequence[list[int]], lengths: NDArray[np.int64]) -> dict[str, Tensor]:
        """`(1, T)` ids and positions, which count from the row's beginning."""
        device = self.backbone.device
        positions = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return {
            "input_ids": torch.tensor([[token for row in ids for token in row]], device=device),
            "position_ids": torch.from_numpy(positions + self._first_position)[None].to(device),
        }

    def _last(self, row: list[int]) -> int:
        """Where stock transformers pools a decoder: at the rightmost id that is not padding's."""
        pad_id = self.backbone.pad_id
        return next((i for i in range(len(row) - 1, -1, -1) if row[i] != pad_id), 0)

    def _packing(self) -> float:
        """The longest row that can be laid end to end with others: none, any, or as long as the base's window.

        Judged by the states of a few texts against those of the stock model, padded.
        """
        dtype = next(self.backbone.model.parameters()).dtype
        ids = sorted(encode(self.backbone.tokenizer, _PROBES, 512).ids, key=len)
        longest, least = 0.0, _TOLERANCE[dtype]
        with torch.inference_mode():
            expected, _ = self._run(ids, [], None)
            # RoBERTa and its kin count positions from the one behind the padding's.
            for first in (0, self.backbone.pad_id + 1):
                before, self._first_position = self._first_position, first
                try:
                    got, _ = self._run(ids, [], self._kernel)
                    error = max(_error(got.of(kind), expected.of(kind)) for kind in ("head", "pooled"))
                except Exception as refusal:  # noqa: BLE001 -- whatever the model says to it, it can be padded
                    log.info("the base's rows are padded: %s", type(refusal).__name__)
                    break
                if error <= least:
                    longest, least = got.rows.window, error
                else:
                    self._first_position = before
            if longest and self._firsts_alone:
                try:
                    alone, _ = self._run(ids, [], self._kernel, training=True)
                    self._firsts_alone = _error(alone.head, expected.head) <= _TOLERANCE[dtype]
                except Exception:  # noqa: BLE001 -- as above
                    self._firsts_alone = False
        return longest

    def _keep_hidden(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        self._flight.hidden = output.last_hidden_state
        output.last_hidden_state = self._by_row(output.last_hidden_state)
        return output

    def _first_tokens(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._by_row(inputs[0]), *inputs[1:])

    def _by_row(self, hidden: Tensor) -> Tensor:
        """`(1, T, H)` as `(B, 1, H)`: all that an encoder's own head reads are the rows' first tokens."""
        rows = self._flight.rows
        if rows is None or rows.kernel is None or self.backbone.decoder or hidden.shape[:2] == (len(rows.starts), 1):
            return hidden
        return _first(hidden, rows)


def _first(hidden: Tensor, rows: Rows) -> Tensor:
    """`(1, T, H)` to the first tokens' `(B, 1, H)`."""
    return hidden[0, torch.from_numpy(rows.starts).to(hidden.device)][:, None]


def _firsts_alone(_module: nn.Module, _inputs: object, named: dict[str, Any], output: Any) -> Any:
    """Behind the last attention no token reads another: where first tokens are all that is asked for, they go on."""
    rows: Rows | None = named.get("packed_rows")
    return (_first(output[0], rows), *output[1:]) if rows is not None and rows.firsts_alone else output


def _pool(hidden: Tensor, rows: Rows, last: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text from the last layer's states, of length 1.

    Args:
        hidden: `(positions, H)`.
        rows: Where the B rows stand.
        last: `(B,)` positions of their last tokens.
        pooling: `mean` over the real tokens, `cls` the first, `last` the last.

    Returns:
        `(B, H)` float32.
    """
    if pooling == "mean":
        tokens = hidden if rows.kernel is not None else hidden[torch.from_numpy(rows.positions).to(hidden.device)]
        lengths = torch.from_numpy(rows.lengths).to(hidden.device)
        pooled = torch.segment_reduce(tokens.float(), "mean", lengths=lengths)
    else:
        pooled = hidden[torch.from_numpy(rows.starts).to(hidden.device) if pooling == "cls" else last].float()
    return nn.functional.normalize(pooled, dim=-1)


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


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
