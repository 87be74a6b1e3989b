"""Prompts that begin alike: their common prefix is computed once, and every row attends to the same copy of it.

Stock model code runs everything but the attention, which transformers lets us register by name. A row's queries meet
the prefix's keys as one product for all rows of the batch (no copy per row, no repeated heads) and its own keys beside
them, under one softmax. Juravsky et al. 2024 (arXiv:2402.05099) take the products apart the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "tuneproof_shared_prefix"
# Relative error against the stock logits of one whole prompt, past which a model is left to stock code.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08}
# Attention scores held at once: on a CPU few enough to stay in its cache, elsewhere few enough to fit in memory.
_SCORES_AT_ONCE = {"cpu": 2**19}
_SCORES_ELSEWHERE = 2**27

Choose = Callable[[Tensor, list[int]], list[list[int]]]
"""Given `(B, H)` last states and the B rows they belong to: the tokens each row goes on with, none where it is done."""


class _NotExact(Exception):
    """The model's attention is of a kind that this one does not compute."""


class SharedPrefix:
    """The keys and values of P tokens that every prompt begins with, and those of one batch's own tokens.

    Args:
        model: A causal language model.
        layers: Keys and values of the prefix by layer, each `(Hkv, P, d)`.
        longest: Most tokens a row will ever have, prompt and answer.
    """

    def __init__(self, model: Any, layers: list[tuple[Tensor, Tensor]], longest: int) -> None:
        self.model, self.layers, self.longest = model, layers, longest
        self.length = layers[0][0].shape[1]
        self._own: list[tuple[Tensor, Tensor]] = []
        self._is_real = torch.empty(0)
        self._hidden = torch.empty(0)
        self._place: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> "SharedPrefix | None":
        """The common prefix of N prompts, by stock code over the longest of them.

        None where the rest of that prompt, attended to here, does not give the stock logits: windows shorter than the
        sequence, capped or sunk attention, rotations that depend on the length, caches of another kind.
        """
        if not (getattr(model, "_supports_attention_backend", False) and model._can_set_attn_implementation()):
            return None
        longest = max(prompts, key=len)
        # In lexical order the first and the last agree on what all agree on. One token of every row is left to run.
        pairs = zip(min(prompts), max(prompts), strict=False)
        n_shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(longest))
        n_shared = min(n_shared, min(map(len, prompts)) - 1)
        ids = torch.tensor([longest], device=model.device)
        stock = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        layers = []
        for layer in getattr(stock.past_key_values, "layers", ()):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or not keys.shape[2] == values.shape[2] == len(longest):
                return None
            layers.append((keys[0, :, :n_shared].contiguous(), values[0, :, :n_shared].contiguous()))
        shared = cls(model, layers, len(longest) + max_new_tokens)
        expected = stock.logits[:, -1].float()
        try:
            with shared.attending():
                got = model.get_output_embeddings()(shared._start([longest])).float()
        except _NotExact:
            return None
        error = (got - expected).norm() / expected.norm().clamp_min(1e-12)
        return shared if error <= _TOLERANCE.get(model.dtype, 1e-3) else None

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Within it, the model attends as here; its own attention is put back after."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def decode(self, prompts: Sequence[list[int]], rows: list[int], choose: Choose, step: Callable[[], None]) -> None:
        """Generates for the prompts numbered `rows`, until `choose` has ended each; `step` is called between."""
        hidden = self._start([prompts[row] for row in rows])
        n_seen = torch.tensor([len(prompts[row]) for row in rows], device=hidden.device)
        while True:
            step()
            fed = choose(hidden, rows)
            going = [i for i, tokens in enumerate(fed) if tokens]
            if not going:
                self._own = []
                return
            if len(going) < len(rows):
                keep = torch.tensor(going, device=hidden.device)
                rows, fed = [rows[i] for i in going], [fed[i] for i in going]
                self._own = [(keys[keep], values[keep]) for keys, values in self._own]
                self._is_real, n_seen = self._is_real[keep], n_seen[keep]
            hidden = self._forward(fed, n_seen)
            n_seen = n_seen + torch.tensor([len(tokens) for tokens in fed], device=hidden.device)

    def _start(self, prompts: list[list[int]]) -> Tensor:
        """A new batch's own prompt tokens. Returns `(B, H)`."""
        fed = [ids[self.length :] for ids in prompts]
        self._own = []
        self._is_real = torch.zeros(len(fed), 0, dtype=torch.bool, device=self.model.device)
        return self._forward(fed, torch.full((len(fed),), self.length, device=self.model.device))

    def _forward(self, fed: list[list[int]], n_seen: Tensor) -> Tensor:
        """The states behind each row's last token, `(B, H)`.

        The rows stand behind one another as one sequence of T tokens, so that none is padding; only their own keys and
        values are laid out by row.

        Args:
            fed: B lists of new tokens.
            n_seen: `(B,)` tokens each row had before.
        """
        device = n_seen.device
        n_fed = torch.tensor([len(tokens) for tokens in fed], device=device)
        column = torch.arange(max(map(len, fed)), device=device)
        is_fed = column < n_fed[:, None]
        self._place = is_fed.nonzero(as_tuple=True)
        # (B, r, n): a token sees the row's real ones before, and of the new ones those up to itself.
        before = self._is_real[:, None].expand(-1, len(column), -1)
        block = (column <= column[:, None]).expand(len(fed), -1, -1)
        self._hidden = ~torch.cat([before, block], 2)[:, None]
        self._is_real = torch.cat([self._is_real, is_fed], 1)
        states = self.model.get_decoder()(
            input_ids=torch.tensor([[token for tokens in fed for token in tokens]], device=device),
            position_ids=(n_seen[:, None] + column)[self._place][None],
            use_cache=False, shared_prefix=self,
        ).last_hidden_state  # fmt: skip
        last: Tensor = states[0, n_fed.cumsum(0) - 1]
        return last

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of T new tokens to the prefix and to their rows' own tokens, n at most.

        Args:
            layer: Which.
            query: `(1, Hq, T, d)`.
            key: `(1, Hkv, T, d)`.
            value: `(1, Hkv, T, d)`.
            scaling: Of the scores.

        Returns:
            `(1, T, Hq, d)`.
        """
        (_, Hq, T, _), Hkv, P = query.shape, key.shape[1], self.length
        query = (query[0] * scaling).transpose(0, 1)
        keys, values = self._with_own(
            layer, self._by_row(key[0].transpose(0, 1)), self._by_row(value[0].transpose(0, 1))
        )
        # Finite, for a row's padding sees nothing of its own.
        lowest = torch.finfo(query.dtype).min
        (B, _, n, _), r = keys.shape, self._hidden.shape[2]
        scores = (self._by_row(query).reshape(B, Hkv, Hq // Hkv * r, -1) @ keys.mT).view(B, Hq, r, n)
        own_scores = self._by_token(scores.masked_fill_(self._hidden, lowest))
        own_weights, out = torch.empty_like(own_scores), query.new_empty(T, Hq, value.shape[3])
        prefix_keys, prefix_values = self.layers[layer]
        at_once = max(1, _SCORES_AT_ONCE.get(query.device.type, _SCORES_ELSEWHERE) // (Hq * (P + n)))
        for start in range(0, T, at_once):
            tokens = slice(start, start + at_once)
            # The batch, and the heads of a group, folded into the queries: (Hkv, t * G, d) x (Hkv, d, P).
            to_prefix = _by_group(query[tokens], Hkv) @ prefix_keys.mT
            scores = torch.cat([to_prefix, _by_group(own_scores[tokens], Hkv)], 2)
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            out[tokens] = _by_head(weights[..., :P] @ prefix_values, Hq)
            own_weights[tokens] = _by_head(weights[..., P:], Hq)
        from_own = self._by_row(own_weights).reshape(B, Hkv, Hq // Hkv * r, n) @ values
        out += self._by_token(from_own.view(B, Hq, r, -1))
        return out[None]

    def _by_row(self, tokens: Tensor) -> Tensor:
        """`(T, h, x)` as `(B, h, r, x)`, with zeros where a row has less than r."""
        B, r = int(self._place[0][-1]) + 1, self._hidden.shape[2]
        rows = tokens.new_zeros(B, r, *tokens.shape[1:])
        rows[self._place] = tokens
        return rows.transpose(1, 2)

    def _by_token(self, rows: Tensor) -> Tensor:
        """`(B, h, r, x)` as `(T, h, x)`."""
        return rows.transpose(1, 2)[self._place]

    def _with_own(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values, the new ones behind those before: `(B, Hkv, n, d)`."""
        if layer == len(self._own):
            self._own.append((key, value))
        else:
            keys, values = self._own[layer]
            self._own[layer] = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return self._own[layer]


def _by_group(tokens: Tensor, Hkv: int) -> Tensor:
    """`(t, Hq, x)` as `(Hkv, t * G, x)`: the query heads of a group meet the same keys."""
    t, Hq, x = tokens.shape
    return tokens.reshape(t, Hkv, Hq // Hkv, x).transpose(0, 1).reshape(Hkv, -1, x)


def _by_head(groups: Tensor, Hq: int) -> Tensor:
    """`(Hkv, t * G, x)` as `(t, Hq, x)`."""
    Hkv, _, x = groups.shape
    return groups.reshape(Hkv, -1, Hq // Hkv, x).transpose(0, 1).reshape(-1, Hq, x)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float | None = None,
    shared_prefix: SharedPrefix | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls in place of its own attention."""
    windowed = sliding_window is not None and shared_prefix is not None and sliding_window < shared_prefix.longest
    if shared_prefix is None or windowed or softcap is not None or s_aux is not None:
        raise _NotExact
    cached = shared_prefix.layers[module.layer_idx]
    if any(kept.shape[::2] != new.shape[1::2] for kept, new in zip(cached, (key, value), strict=True)):
        raise _NotExact  # the cache holds something else than keys and values
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, _attend)
