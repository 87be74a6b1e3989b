"""What is asked of the engine: texts as long as BANKING77's, random adapters. Stands on the ML floor alone."""

import re
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.ml.adapter import Adapter, Linear, laid_flat
from service.ml.engine import Engine

RANK = 16
# Share of texts up to so many tokens: quantiles of the 13,083 texts of BANKING77 (Casanueva et al. 2020,
# arXiv:2003.04807) in MiniLM's tokens, [CLS] and [SEP] included; their mean is 15.9.
_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
_TOKENS = (4, 8, 11, 13, 17, 26, 35, 51, 98)


def lengths(n: int, seed: int = 0) -> NDArray[np.int64]:
    """`(n,)` tokens per text, special ones included, in random order."""
    shares = np.random.default_rng(seed).permutation((np.arange(n) + 0.5) / n)
    return np.rint(np.interp(shares, _QUANTILES, _TOKENS)).astype(np.int64)


def texts(tokenizer: Any, n: int, seed: int = 0) -> list[str]:
    """`n` texts of so many tokens: words of the tokenizer's vocabulary, each one token, between [CLS] and [SEP]."""
    words = np.array(sorted(word for word in tokenizer.get_vocab() if re.fullmatch("[a-z]{3,7}", word)))
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(words, length - 2)) for length in lengths(n, seed)]


def random_adapter(engine: Engine, n_labels: int, seed: int) -> Adapter:
    """LoRA on every attention projection and a head, in the base's precision; for before any is attached."""
    torch.manual_seed(seed)
    some, rng = next(engine.backbone.model.parameters()), np.random.default_rng(seed)
    projections = tuple(engine.backbone.attention_projections())
    lora = {
        name: tuple(
            0.05 * rng.standard_normal(shape, "f4") for shape in ((RANK, x.in_features), (x.out_features, RANK))
        )
        for name, x in engine.backbone.model.named_modules()
        if isinstance(x, torch.nn.Linear) and name.endswith(projections)
    }  # fmt: skip
    head = Linear(torch.randn(n_labels, engine.head_width), torch.zeros(n_labels))
    adapter = Adapter(tuple(map(str, range(n_labels))), head, "head", 192, *laid_flat(lora))
    return adapter.to(some.device, some.dtype)


def encoder_flops(config: Any, n_tokens: NDArray[np.int64]) -> float:
    """Of BERT's matrix products for texts of so many tokens: linear layers, attention, the pooler of each text."""
    h, n = config.hidden_size, n_tokens.astype(float)
    linear = 2 * (4 * h * h + 2 * h * config.intermediate_size) * n
    attention = 4 * h * n * n
    return float(config.num_hidden_layers * (linear + attention).sum() + 2 * h * h * len(n))


def matrix_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """The best rate of a `size`³ product, FLOP/s."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
