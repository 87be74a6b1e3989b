"""The engine against the raw forward of the same base: a Qwen3 of random weights. Stands on the ML floor alone."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config

from _measures import Measure, in_rounds, ratio, seconds
from _workload import lengths, random_adapter
from service.ml.adapter import Adapter
from service.ml.backbone import Backbone
from service.ml.device import DTYPES, pick_device, serving_precision
from service.ml.encode import token_batches
from service.ml.engine import Engine

BATCH_TOKENS, N_ADAPTERS, VOCABULARY = 8192, 16, 32_000
_SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 3072},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "intermediate_size": 96},
}  # fmt: skip


class Letters:
    """Texts as letters: the engine looks at a few when it takes a base over."""

    pad_token_id = 0

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(letter) % (VOCABULARY - 1) for letter in text] for text in texts]}


def forward_measures(
    device_name: str, shape: str, rounds: int, quick: bool
) -> tuple[str, list[Measure], dict[str, Any]]:
    """Title, measures, and what is to be known of the machine.

    Both sides score the same texts: the raw forward in batches sorted by length and padded to at most 8k tokens, its
    tensors ready on the device; the engine in calls of 8k real tokens in random order, as they come from a queue.
    """
    device = pick_device(device_name)
    precision = serving_precision(device)
    config = Qwen3Config(vocab_size=VOCABULARY, num_labels=2, pad_token_id=0, use_cache=False, **_SHAPES[shape])
    attention = "eager" if device.type == "cpu" else "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=DTYPES[precision], attn_implementation=attention
        )
    model = model.eval().requires_grad_(False)
    n_tokens = lengths(1000 if quick or shape == "tiny" else 8000)
    chance = np.random.default_rng(0)
    ids = [chance.integers(1, VOCABULARY, n).tolist() for n in n_tokens]
    batches = [
        torch.tensor([ids[i] + [0] * (int(n_tokens[rows].max()) - len(ids[i])) for i in rows], device=device)
        for rows in token_batches(n_tokens, BATCH_TOKENS, len(ids))
    ]
    body = copy.deepcopy(model.model)  # the engine takes its own over
    source: Any = None
    engine = Engine(Backbone(model, Letters(), True, "score", (), "last", source))
    adapters = [random_adapter(engine, 2 + i, i) for i in range(N_ADAPTERS)]
    for adapter in adapters:
        engine.attach(adapter)
    call_of = np.cumsum(n_tokens) // BATCH_TOKENS
    calls = [[ids[i] for i in np.flatnonzero(call_of == call)] for call in range(int(call_of[-1]) + 1)]

    @torch.inference_mode()
    def raw() -> None:
        torch.cat([body(batch).last_hidden_state[:, -1] for batch in batches]).cpu()

    def scored(by: Sequence[Adapter]) -> None:
        for call in filter(None, calls):
            engine.score(call, [by[i % len(by)] for i in range(len(call))])

    variants = {
        "forward": lambda: len(ids) / seconds(raw),
        "one": lambda: len(ids) / seconds(lambda: scored(adapters[:1])),
        "mixed16": lambda: len(ids) / seconds(lambda: scored(adapters)),
    }
    taken = {name: values[1:] for name, values in in_rounds(variants, rounds + 1).items()}  # the first warms up
    measures = [
        Measure("engine_one_vs_forward", ratio(taken, "one", "forward"), at_least=0.9),
        Measure("engine_mixed16_vs_forward", ratio(taken, "mixed16", "forward"), at_least=0.85),
        *(Measure(f"{name}_texts_per_second", values) for name, values in taken.items()),
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    title = f"Qwen3 {shape} of random weights, {precision}, {name}; texts of {n_tokens.mean():.1f} tokens"
    return title, measures, {"device": name, "precision": precision, "shape": shape}
