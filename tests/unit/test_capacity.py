"""The capacity model: its sizes are the engine's, its caches behave, and the page holds what it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, Qwen3Config

from service.core.settings import Settings
from service.inference import adapters
from service.ml import engine
from service.ml.adapter import Adapter, Linear, laid_flat
from service.ml.base_models import EMBEDDED, find_base, locate

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"


@pytest.fixture(scope="module")
def capacity() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import capacity

    sys.path.remove(str(ROOT / "benchmarks"))
    return capacity


def stock(name: str) -> torch.nn.Module:
    if name == "MiniLM":
        config = AutoConfig.from_pretrained(locate(find_base(EMBEDDED, None)).folder)
    else:
        config = Qwen3Config(
            hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
            intermediate_size=3072, vocab_size=151_936,
        )  # fmt: skip
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("name", ["F2LLM-0.6B", "MiniLM"])
def test_sizes_are_those_of_the_stock_model_and_of_the_engines_adapter(capacity: ModuleType, name: str) -> None:
    shape = next(shape for shape in (capacity.F2LLM, capacity.MINILM) if shape.name == name)
    model = stock(name)
    wrapped = {
        at: layer
        for at, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and {"self_attn", "attention"} & {*at.split(".")}
    }
    lora = {
        at: (np.zeros((shape.rank, layer.in_features), "f4"), np.zeros((layer.out_features, shape.rank), "f4"))
        for at, layer in wrapped.items()
    }
    head = Linear(torch.zeros(77, shape.hidden), torch.zeros(77))
    made = Adapter(tuple(map(str, range(77))), head, "head", 192, *laid_flat(lora))
    assert made.size_bytes == shape.adapter_bytes(4, 77)
    assert made.to(torch.device("cpu"), torch.bfloat16).size_bytes == shape.adapter_bytes(2, 77)
    assert shape.weights == pytest.approx(sum(weight.numel() for weight in model.parameters()), rel=0.01)


def test_what_it_takes_from_the_service_is_what_the_service_has(capacity: ModuleType) -> None:
    assert capacity.LOADERS == adapters._LOADERS
    assert (engine.MAX_ROWS, engine.TOKEN_BUDGET["cuda"]) == (capacity.BATCH_ROWS, capacity.BATCH_TOKENS)
    from service.api import recent

    assert capacity.REMEMBERED == recent._MOST
    defaults = Settings()
    assert defaults.adapter_cache_bytes == capacity.GiB
    page = PAGE.read_text("utf-8")
    assert f"`TUNEPROOF_SERVE_MEMORY_BYTES` ({defaults.serve_memory_bytes // capacity.GiB} GiB)" in page
    assert f"`TUNEPROOF_DATABASE_CONNECTIONS` ({defaults.database_connections})" in page
    assert f"`TUNEPROOF_MAX_QUEUED_JOBS`, {defaults.max_queued_jobs:,}" in page


def test_the_cache_is_the_least_recently_used_one(capacity: ModuleType) -> None:
    even = np.full(1000, 1 / 1000)
    assert capacity.lru_hit_rate(even, 250, n=20_000) == pytest.approx(0.25, abs=0.02)
    assert capacity.lru_hit_rate(even, 1000, n=1000) == 1.0
    # Che's approximation (Che, Tung, Wang 2002): the time t in which a cache of C fills solves sum(1 - exp(-p t)) = C.
    shares, held = capacity.zipf(5000, 1.0), 400
    low, high = 0.0, 1e7
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < held else (low, middle)
    expected = float((shares * (1 - np.exp(-shares * low))).sum())
    assert capacity.lru_hit_rate(shares, held, n=60_000) == pytest.approx(expected, abs=0.01)


def test_a_model_at_its_own_replica_is_at_hand_more_often(capacity: ModuleType) -> None:
    shares = capacity.zipf(2000, 1.0)
    assert capacity.lru_hit_rate(shares, 100, 8, n=20_000) > capacity.lru_hit_rate(shares, 100, n=20_000) + 0.1


def test_more_is_never_served_by_less(capacity: ModuleType) -> None:
    small = capacity.Fleet(capacity.Inputs(predictions=5_000, adapters=10_000))
    large = capacity.Fleet(capacity.Inputs())
    for which in (0, 1):
        assert small.replicas(which) <= large.replicas(which)
        assert large.replicas(1) <= large.replicas(0)
    assert small.api_cores < large.api_cores


def test_the_page_holds_what_the_program_prints(capacity: ModuleType) -> None:
    page = PAGE.read_text("utf-8")
    assert capacity.with_tables(page, capacity.tables(capacity.Inputs())) == page, (
        "run: python benchmarks/capacity.py --page docs/scale.md"
    )
    given = capacity.Inputs()
    for figure in (given.predictions, given.adapters, given.trainings_a_day, given.rows_a_training):
        assert f"{figure:,.0f}" in page
    folder, s3 = (f"{1000 * seconds:.0f} ms" for seconds in (given.load_seconds.best, given.load_seconds.worst))
    assert f"{folder} from a folder, {s3} from S3" in page


def test_it_writes_its_figures_and_takes_other_inputs(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "benchmarks/capacity.py", "--quick", "--json", file, "--adapters", "2000"]
    told = subprocess.check_output(
        [*command, "--predictions", "1000"], text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    figures = json.loads(file.read_text())
    assert {"name": "gpus_to_hold_every_adapter", "value": 1} in figures["measures"]
    assert figures["machine"]["inputs"]["adapters"] == 2000
    assert len(re.findall(r"^\|", told, re.MULTILINE)) > 20
