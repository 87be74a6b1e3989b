"""The engine without a service around it, beside stock PEFT and beside itself without adapters."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from _catalogue import MAX_LENGTH, save_adapter, save_bare, stock_peft
from _measures import Measure, in_rounds, ratio, seconds
from _workload import encoder_flops, matrix_rate, texts
from service.ml.adapter import Adapter, Layout, load_adapter
from service.ml.backbone import load_backbone
from service.ml.base_models import EMBEDDED, Located, find_base, locate
from service.ml.device import DTYPES, pick_device, serving_precision
from service.ml.encode import encode
from service.ml.engine import Engine

CALL, N_CALLS, N_ADAPTERS, MOST_LABELS, PADDED_TO = 64, 2, 16, 77, 192
# Of the logits' relative error against PEFT's: bf16 keeps 8 bits, and errors add up over the layers.
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}


@dataclass
class Alone:
    """An engine, and adapters that lie in folders: `uniform` of 77 labels, `varied` of 2 to 77, `bare` a head alone."""

    source: Located
    engine: Engine
    precision: str
    uniform: list[Path]
    varied: list[Path]
    bare: Path
    texts: list[str]

    @classmethod
    def over(cls, folder: Path) -> "Alone":
        """Writes the adapters into `folder` and loads the base."""
        source, device = locate(find_base(EMBEDDED, None)), pick_device("cpu")
        precision = serving_precision(device)
        engine = Engine(load_backbone(source, device=device, dtype=DTYPES[precision]))
        tokenizer = engine.backbone.tokenizer
        counts = np.linspace(2, MOST_LABELS, N_ADAPTERS).astype(int).tolist()
        save = partial(save_adapter, source=source, tokenizer=tokenizer)
        return cls(
            source, engine, precision,
            [save(folder / f"uniform_{i}", n_labels=MOST_LABELS, seed=i) for i in range(N_ADAPTERS)],
            [save(folder / f"varied_{i}", n_labels=count, seed=i) for i, count in enumerate(counts)],
            save_bare(folder / "bare", source, tokenizer, MOST_LABELS),
            texts(tokenizer, CALL * 32),
        )  # fmt: skip

    def in_fp32(self) -> "Alone":
        """The same adapters on a base of its own, in the precision that stock PEFT computes in."""
        backbone = load_backbone(self.source, device=self.engine.backbone.device, dtype=torch.float32)
        return replace(self, engine=Engine(backbone), precision="fp32")

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def calls(self) -> list[list[str]]:
        return [self.texts[start : start + CALL] for start in range(0, len(self.texts), CALL)]

    @property
    def mean_tokens(self) -> float:
        return float(np.mean([len(row) for row in self.ids(self.texts)]))

    def ids(self, some: list[str]) -> list[list[int]]:
        return encode(self.engine.backbone.tokenizer, some, MAX_LENGTH).ids

    def load(self, folder: Path) -> Adapter:
        backbone = self.engine.backbone
        adapter = load_adapter(
            folder, head_name=backbone.head_name, device=backbone.device, dtype=DTYPES[self.precision]
        )  # fmt: skip
        self.engine.attach(adapter)
        return adapter


def engine_measures(alone: Alone, rounds: int) -> list[Measure]:
    """Calls of 64 texts, token ids at hand; with PEFT text to logits on both sides."""
    bare = alone.load(alone.bare)
    uniform, varied = ([alone.load(folder) for folder in folders] for folders in (alone.uniform, alone.varied))
    calls = alone.calls[:N_CALLS]
    ids = [alone.ids(call) for call in calls]
    padded = [[row + [alone.engine.backbone.pad_id] * (PADDED_TO - len(row)) for row in call] for call in ids]
    stock = stock_peft(alone.source, alone.uniform, MOST_LABELS)
    names = [alone.uniform[i % N_ADAPTERS].name for i in range(CALL)]
    config: Any = stock.config

    def scores(batches: list[list[list[int]]], adapters: list[Adapter]) -> float:
        mixed = [[adapters[i % len(adapters)] for i in range(len(batch))] for batch in batches]
        taken = seconds(lambda: [alone.engine.score(*both) for both in zip(batches, mixed, strict=True)])
        return sum(map(len, batches)) / taken

    @torch.inference_mode()
    def by_peft(call: list[str]) -> torch.Tensor:
        batch = stock_tokenizer(call, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        logits: torch.Tensor = stock(**batch, adapter_names=names).logits
        return logits

    def from_text(side: Alone, adapters: list[Adapter]) -> float:
        mixed = [adapters[i % N_ADAPTERS] for i in range(CALL)]
        return CALL * N_CALLS / seconds(lambda: [side.engine.score(side.ids(call), mixed) for call in calls])

    stock_tokenizer = AutoTokenizer.from_pretrained(alone.bare)
    exact = alone.in_fp32()
    exactly = [exact.load(folder) for folder in exact.uniform]
    expected = by_peft(calls[0]).numpy()
    for side, adapters in ((alone, uniform), (exact, exactly)):
        _check(side, [adapters[i % N_ADAPTERS] for i in range(CALL)], calls[0], expected)
    variants = {
        "none": lambda: scores(ids, [bare]),
        "one": lambda: scores(ids, varied[:1]),
        "mixed16": lambda: scores(ids, varied),
        "matrix": lambda: matrix_rate(DTYPES[alone.precision]),
        "from_text": lambda: from_text(alone, uniform),
        "from_text_fp32": lambda: from_text(exact, exactly),
        "peft": lambda: CALL * N_CALLS / seconds(lambda: [by_peft(call) for call in calls]),
        "padded": lambda: scores([padded[0][:16]], [bare]),
    }  # fmt: skip
    taken = in_rounds(variants, rounds + 1)
    taken = {name: values[1:] for name, values in taken.items()}  # the first round warms up
    flops = encoder_flops(config, np.array([len(row) for call in ids for row in call])) / (CALL * N_CALLS)
    return [
        Measure("engine_mixed16_vs_peft", ratio(taken, "from_text", "peft"), at_least=4),
        Measure("engine_mixed16_vs_peft_both_fp32", ratio(taken, "from_text_fp32", "peft")),
        Measure("engine_one_vs_none", ratio(taken, "one", "none"), at_least=0.9),
        Measure("engine_mixed16_vs_none", ratio(taken, "mixed16", "none"), at_least=0.8),
        Measure("engine_share_of_matrix_rate", [flops * x for x in ratio(taken, "mixed16", "matrix")], at_least=0.35),
        Measure("sorted_batches_vs_padded_192", ratio(taken, "none", "padded")),
        Measure("engine_mixed16_texts_per_second", taken["mixed16"]),
        Measure("peft_texts_per_second", taken["peft"]),
    ]


def _check(alone: Alone, adapters: list[Adapter], call: list[str], expected: Any) -> None:
    """What is compared for speed must answer the same."""
    got = np.stack(alone.engine.score(alone.ids(call), adapters))
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    without = np.stack(alone.engine.score(alone.ids(call), [replace(one, layout=Layout(())) for one in adapters]))
    unlike = float(np.linalg.norm(without - expected) / np.linalg.norm(expected))
    if not error <= _TOLERANCE[alone.precision] < unlike / 3:
        allowed = _TOLERANCE[alone.precision]
        raise SystemExit(json.dumps({"logits_relative_error": error, "allowed": allowed, "without_lora": unlike}))
