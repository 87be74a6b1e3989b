"""Which rows of a batch belong to which adapter, and the products that this adds to a layer.

LoRA: y = W x + (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685). The tokens of one adapter are cut into blocks of
equal size, so the products of all adapters of a layer are two batched ones however many there are; Punica (Chen et al.
2023, arXiv:2310.18547) has the same idea as a kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.ml.adapter import Adapter, Layout
from service.ml.packed import Rows


@dataclass(eq=False)
class Share:
    """The tokens of a batch whose adapters have the same layers and ranks.

    Args:
        layout: Of all its adapters.
        parts: N, for each block of tokens its adapter's numbers by layer.
        tokens: `(n,)` positions in the batch; None where that is every one in its order.
        blocks: `(N, b)` positions in the batch, filled up with any; None where one adapter has it all.
        places: `(n,)`, for each of `tokens` its place in the blocks; None where they stand there in order.
    """

    layout: Layout
    parts: list[tuple[Tensor, ...]]
    tokens: Tensor | None
    blocks: Tensor | None
    places: Tensor | None
    _input: Tensor | None = None
    _blocked: Tensor | None = None

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Adds the layer's LoRA products of `x` `(…, in)` to `y` `(positions, out)`."""
        pair = self.layout.pair(name, self.parts)
        if pair is None:
            return
        down, up = pair
        if self.blocks is None and self.tokens is None:
            y.addmm_(x.flatten(0, -2) @ down[0], up[0])
            return
        # (N, b, in) x (N, in, r) x (N, r, out)
        delta = torch.bmm(torch.bmm(self._in_blocks(x), down), up).flatten(0, 1)
        if self.places is not None:
            delta = delta.index_select(0, self.places)  # on a CPU a sixth of the time of delta[self.places]
        if self.tokens is None:
            y += delta
        else:
            y.index_add_(0, self.tokens, delta)

    def _in_blocks(self, x: Tensor) -> Tensor:
        if self._input is not x or self._blocked is None:  # query, key and value read the same input
            assert self.blocks is not None  # the one case without needs none
            rows = x.flatten(0, -2).index_select(0, self.blocks.flatten())
            self._input, self._blocked = x, rows.view(*self.blocks.shape, -1)
        return self._blocked


@dataclass(eq=False)
class Mixture:
    """The adapters of a batch in flight.

    Args:
        rows_of: By distinct adapter, the rows it has.
        shares: By layout, for the LoRA products.
        n_rows: B.
    """

    rows_of: list[tuple[Adapter, Tensor]] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    n_rows: int = 0

    @classmethod
    def of(cls, adapters: Sequence[Adapter], rows: Rows) -> "Mixture":
        """Lays out a batch of B rows, each with its adapter, or none of them with any."""
        if not adapters:
            return cls()
        distinct = {id(adapter): adapter for adapter in adapters}
        numbers = {key: i for i, key in enumerate(distinct)}
        of_row = np.fromiter((numbers[id(adapter)] for adapter in adapters), dtype=np.int64, count=len(adapters))
        rows_of = [
            (adapter, torch.from_numpy(np.flatnonzero(of_row == i)).to(rows.device))
            for i, adapter in enumerate(distinct.values())
        ]
        by_layout: dict[Layout, list[int]] = {}
        for i, adapter in enumerate(distinct.values()):
            if adapter.layout.layers:
                by_layout.setdefault(adapter.layout, []).append(i)
        of_token = np.repeat(of_row, rows.lengths)
        everyone = list(distinct.values())
        shares = [
            _share(layout, [everyone[i].parts for i in members], np.array(members), of_token, rows)
            for layout, members in by_layout.items()
        ]
        return cls(rows_of, shares, len(adapters))


def _share(
    layout: Layout, parts: list[tuple[Tensor, ...]], members: NDArray[np.int64], of_token: NDArray[np.int64],
    rows: Rows,
) -> Share:  # fmt: skip
    of_layout = np.isin(of_token, members)
    tokens = rows.positions[of_layout]
    # Where every position of the batch is one of these tokens, as it is where nothing is padded, no index is needed.
    everywhere = len(tokens) == len(rows.positions) == int(rows.starts[-1] + rows.lengths[-1])
    where = None if everywhere else torch.from_numpy(tokens).to(rows.device)
    if len(members) == 1:
        return Share(layout, parts, where, None if where is None else where[None], None)
    group = np.searchsorted(members, of_token[of_layout])
    counts = np.bincount(group, minlength=len(members))
    size = -(-len(tokens) // len(members))
    n_blocks = -(-counts // size)
    order = np.argsort(group, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (np.cumsum(n_blocks) - n_blocks)[group] * size + rank
    blocks = np.full(int(n_blocks.sum()) * size, tokens[0])
    blocks[places] = tokens
    parts = [own for own, n in zip(parts, n_blocks.tolist(), strict=True) for _ in range(n)]
    return Share(
        layout, parts, where, torch.from_numpy(blocks.reshape(-1, size)).to(rows.device),
        torch.from_numpy(places).to(rows.device),
    )  # fmt: skip
