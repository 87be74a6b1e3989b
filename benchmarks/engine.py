"""What sorting by length saves, and what adapters cost: the engine on MiniLM over texts of the example file.

Ratios within one run; medians of several rounds, each round measuring every variant once.
"""

import argparse
import csv
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from service.ml.adapter import Adapter, Linear
from service.ml.backbone import load_backbone
from service.ml.base_models import EMBEDDED, find_base, locate
from service.ml.device import DTYPES, pick_device, serving_precision
from service.ml.encode import encode
from service.ml.engine import Engine

EXAMPLE = Path(__file__).parents[1] / "examples" / "support_tickets.csv"
RANK, N_ADAPTERS, PADDED_TO = 16, 16, 192


def random_adapter(engine: Engine, n_labels: int, seed: int) -> Adapter:
    """LoRA of rank 16 on every attention projection, and a head."""
    torch.manual_seed(seed)
    lora = {}
    projections = tuple(engine.backbone.attention_projections())
    for name, module in engine.backbone.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(projections):
            lora[name] = (
                0.02 * torch.randn(RANK, module.in_features),
                0.02 * torch.randn(module.out_features, RANK),
            )
    head = Linear(torch.randn(n_labels, engine.head_width), torch.zeros(n_labels))
    return Adapter(tuple(map(str, range(n_labels))), head, "head", PADDED_TO, lora)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = pick_device()
    dtype = DTYPES[serving_precision(device)]
    engine = Engine(load_backbone(locate(find_base(EMBEDDED, None)), device=device, dtype=dtype))
    with EXAMPLE.open(encoding="utf-8-sig", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["text"]][: 128 if given.quick else 512]
    ids = encode(engine.backbone.tokenizer, texts, PADDED_TO).ids
    plain = random_adapter(engine, 8, 0)
    bare = Adapter(plain.labels, plain.head, "head", PADDED_TO)
    # Heads of 3 to 18 labels: they need not agree.
    adapters = [random_adapter(engine, 3 + i, i) for i in range(N_ADAPTERS)]
    padded = [row + [engine.backbone.pad_id] * (PADDED_TO - len(row)) for row in ids]
    variants: dict[str, Callable[[], object]] = {
        "no_adapter": lambda: engine.score(ids, [bare] * len(ids)),
        "padded_to_192": lambda: engine.score(padded, [bare] * len(ids)),
    }
    rounds = 3 if given.quick else 5
    seconds = _measure(variants, rounds)
    # Attaching wraps the layers for good, so these come after the bare ones, which are measured again beside them.
    for adapter in (plain, *adapters):
        engine.attach(adapter)
    mixed = [adapters[i % N_ADAPTERS] for i in range(len(ids))]
    with_adapters = _measure(
        {
            "no_adapter": variants["no_adapter"],
            "one_adapter": lambda: engine.score(ids, [plain] * len(ids)),
            "sixteen_mixed": lambda: engine.score(ids, mixed),
        },
        rounds,
    )
    measures = {
        "sorted_batches_vs_padded_192": seconds["padded_to_192"] / seconds["no_adapter"],
        "engine_one_vs_none": with_adapters["no_adapter"] / with_adapters["one_adapter"],
        "engine_mixed16_vs_none": with_adapters["no_adapter"] / with_adapters["sixteen_mixed"],
    }
    table = Table(
        "measure", "ratio", title=f"{len(ids)} texts, {np.mean([len(r) for r in ids]):.0f} tokens each, {dtype}"
    )
    for name, value in measures.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    if given.json:
        machine = {"device": str(device), "cpu": platform.machine(), "threads": torch.get_num_threads()}
        body = {"machine": machine, "measures": [{"name": n, "value": v} for n, v in measures.items()]}
        given.json.write_text(json.dumps(body, indent=1) + "\n")


def _measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant; every round runs them all, so that a busy moment hits them alike."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


if __name__ == "__main__":
    main()
