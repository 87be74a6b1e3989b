"""The benchmark of training in its smallest form: it runs from end to end and gives every figure that was promised."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import labelled_texts

ROOT = Path(__file__).parents[2]
AT_LEAST = {
    "rows_per_second_vs_notebook": 30, "rows_per_second_vs_tuned_trainer": 1.5, "time_to_quality_vs_notebook": 100,
    "test_accuracy": 0.938, "accuracy_over_probe": 0.005, "over_probe_16_per_label": -0.003,
    "over_probe_sms_spam": -0.003, "over_probe_example": -0.003, "share_of_matrix_rate": 0.35,
}  # fmt: skip
# What is not on a machine with the ML libraries alone, as one with a GPU may be.
BARE = """
import importlib.util, runpy, sys
missing = {"fastapi", "starlette", "sqlalchemy", "pydantic", "pydantic_core", "pydantic_settings", "alembic", "uvicorn"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in missing else find_spec(name, *more)
sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str, through: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    # One thread: two that wait for each other on cores that others use take many times as long.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *through, str(ROOT / "benchmarks/training.py"), "--quick", *arguments]
    return subprocess.run(command, check=False, env=environment, timeout=800, capture_output=True, text=True)


def measured(tmp_path: Path, *arguments: str, **more: tuple[str, ...]) -> dict[str, dict[str, float]]:
    ended = run("--json", str(tmp_path / "figures.json"), *arguments, **more)
    assert ended.returncode == 0, ended.stderr
    measures = json.loads((tmp_path / "figures.json").read_text())["measures"]
    assert all(math.isfinite(measure["value"]) for measure in measures)
    return {measure["name"]: measure for measure in measures}


@pytest.mark.more
@pytest.mark.timeout(900)
def test_the_smallest_run_gives_every_figure_and_its_bound(tmp_path):
    for name, mark in (("banking77.csv", ","), ("sms_spam.tsv", "\t")):
        rows = zip(*labelled_texts(240), strict=True)
        (tmp_path / name).write_text("".join(f"{a}{mark}{b}\n" for a, b in [("text", "label"), *rows]))
    figures = measured(tmp_path, "--data", str(tmp_path / "banking77.csv"))
    assert {name: figures[name]["at_least"] for name in AT_LEAST} == AT_LEAST
    assert figures["peak_memory_vs_notebook"]["at_most"] == 1
    # Keywords decide these labels: a state that learned them stands at the target, and the time to it is told.
    assert figures["time_to_quality_vs_notebook"]["value"] > 0
    assert figures["seconds_to_0.918"]["value"] <= figures["seconds_of_a_run"]["value"]
    assert figures["notebook_peak_memory_bytes"]["value"] > 2e8


@pytest.mark.more
def test_the_form_for_gpus_runs_on_a_tiny_base_and_the_ml_libraries_alone(tmp_path):
    figures = measured(tmp_path, "--shape", "tiny", through=("-c", BARE))
    assert [figures[f"rows_per_second_vs_notebook_{n}"]["at_least"] for n in (16, 100)] == [8, 2]
    assert figures["peak_memory_bytes_64x192"]["at_most"] == 10e9


@pytest.mark.more
def test_without_its_data_the_benchmark_says_so_and_ends_with_status_2(tmp_path):
    ended = run("--data", str(tmp_path / "nowhere.csv"))
    assert ended.returncode == 2
    assert "nowhere.csv" in ended.stderr
    assert "Traceback" not in ended.stderr
