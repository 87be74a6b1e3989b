"""The benchmark of serving in its smallest form: it runs from end to end and gives every figure that was promised."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOUNDS = {
    "engine_mixed16_vs_peft": 4, "engine_one_vs_none": 0.9, "engine_mixed16_vs_none": 0.8, "http_single_vs_plain": 7,
    "http_batch_vs_plain": 3.5, "http_batch_vs_engine": 0.8, "thousand_zipf_vs_mixed16": 0.9,
    "cold_adapter_extra_seconds": 0.05, "engine_share_of_matrix_rate": 0.35,
    "bulk_vs_engine": 0.85,
}  # fmt: skip


def measured(tmp_path: Path, *arguments: str) -> dict[str, dict[str, float]]:
    # One thread: two that wait for each other on cores that others use take many times as long.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/serving.py"), "--json", str(tmp_path / "figures.json")]
    subprocess.run([*command, "--rounds", "1", *arguments], env=environment, check=True, timeout=800)
    measures = json.loads((tmp_path / "figures.json").read_text())["measures"]
    assert all(math.isfinite(measure["value"]) and measure["value"] >= 0 for measure in measures)
    return {measure["name"]: measure for measure in measures}


@pytest.mark.more
@pytest.mark.timeout(900)
def test_the_smallest_run_gives_every_figure_and_its_bound(tmp_path):
    figures = measured(tmp_path, "--seconds", "0.3", "--models", "48")
    bounds = {name: figures[name].get("at_least", figures[name].get("at_most")) for name in BOUNDS}
    assert bounds == BOUNDS
    assert figures["adapter_cache_evictions"]["value"] > 0  # or the thousand would be no test of the cache


@pytest.mark.more
def test_the_form_for_gpus_runs_on_a_tiny_base(tmp_path):
    figures = measured(tmp_path, "--shape", "tiny")
    assert {name: figures[name]["at_least"] for name in ("engine_one_vs_forward", "engine_mixed16_vs_forward")} == {
        "engine_one_vs_forward": 0.9, "engine_mixed16_vs_forward": 0.85,
    }  # fmt: skip
