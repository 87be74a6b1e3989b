"""The rows of a batch laid end to end: no padding is multiplied, and stock model code runs everything but attention.

transformers lets attention be registered by name and hands extra arguments of a forward through to it; here that is
the `Rows` in flight. Rows stand shortest first, so those of one length are one slice and attend without a mask.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "tuneproof_packed"
_MOST_PLAIN = 256  # tokens; beyond, all scores of a row take more memory than their products save time
Kernel = Literal["by_length", "varlen"]


class NotPacked(Exception):
    """The model's attention is of a kind, or a row of a length, that this one does not compute."""


@dataclass(eq=False)
class Rows:
    """B rows of a batch by where their tokens stand among its positions.

    Args:
        lengths: `(B,)` tokens per row, ascending.
        starts: `(B,)` position of each row's first token.
        device: Of the batch.
        kernel: How they attend; None where they are padded.
        firsts_alone: Whether all that is asked for are the first tokens' states.
        window: The narrowest that attention was asked for on the way, in tokens; longer rows do not fit through it.
    """

    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    device: torch.device
    kernel: Kernel | None
    firsts_alone: bool = False
    window: float = math.inf

    @property
    def longest(self) -> int:
        return int(self.lengths[-1])

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """For each length: the position where its rows begin, how many they are, and the length."""
        lengths, first, counts = np.unique(self.lengths, return_index=True, return_counts=True)
        return [(int(self.starts[i]), int(n), int(length)) for length, i, n in zip(lengths, first, counts, strict=True)]

    @cached_property
    def boundaries(self) -> Tensor:
        """`(B + 1,)` int32."""
        ends = np.append(self.starts, self.starts[-1] + self.lengths[-1])
        return torch.from_numpy(ends.astype(np.int32)).to(self.device)

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """`(tokens,)`: where the rows' tokens stand, row by row."""
        offsets = np.repeat(self.starts - np.cumsum(self.lengths) + self.lengths, self.lengths)
        return offsets + np.arange(int(self.lengths.sum()))


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """How rows laid end to end attend on a device; None where padding is the faster way."""
    if device.type == "cpu":
        return "by_length"
    fast = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if fast and torch.cuda.get_device_capability(device) >= (8, 0) else None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float | None = None,
    packed_rows: Rows | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls in place of its own attention: `(1, H, T, d)` each, to `(1, T, H, d)`."""
    rows = packed_rows
    if rows is None or softcap is not None or s_aux is not None or position_bias is not None:
        raise NotPacked
    rows.window = min(rows.window, math.inf if sliding_window is None else sliding_window)
    if rows.longest > rows.window:
        raise NotPacked
    causal = bool(getattr(module, "is_causal", True))
    attend = _varlen if rows.kernel == "varlen" else _by_length
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(rows, query, key, value, causal, scaling)[None], None


def _by_length(rows: Rows, query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float | None) -> Tensor:
    """`(T, H, d)` each, to `(T, H, d)`; keys and values may have fewer heads."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    sizes, answers = [n_rows * length for _start, n_rows, length in rows.spans], []
    cut = (torch.split(x, sizes) for x in (query, key, value))
    for (_start, n_rows, length), *span in zip(rows.spans, *cut, strict=True):
        q, k, v = (x.view(n_rows, length, *x.shape[1:]).transpose(1, 2) for x in span)
        attend = _plainly if torch.is_grad_enabled() and length <= _MOST_PLAIN else scaled_dot_product_attention
        answer = attend(q, k, v, is_causal=causal, scale=scaling)
        answers.append(answer.transpose(1, 2).flatten(0, 1))
    return torch.cat(answers)


def _plainly(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None) -> Tensor:
    """`(B, H, L, d)` each. For short bf16 rows on a CPU torch's fused kernel takes ten times as long there and back.

    For training alone: served batches have rows of many lengths, and a product of each in the cache of compiled ones.
    """
    length, d = query.shape[2:]
    q, k, v = (x.reshape(-1, length, x.shape[3]) for x in (query, key, value))
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=d**-0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).view(*query.shape[:3], v.shape[2])


def _varlen(rows: Rows, query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    takes = signature(varlen_attn).parameters
    more: dict[str, Any] = {} if scaling is None else {"scale": scaling}
    if causal:
        more |= {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x.contiguous() for x in (key, value))
    ends, longest = rows.boundaries, rows.longest
    answer = varlen_attn(query.contiguous(), key, value, ends, ends, longest, longest, **more)
    assert isinstance(answer, Tensor)  # no second value was asked for
    return answer


AttentionInterface.register(NAME, _attend)
