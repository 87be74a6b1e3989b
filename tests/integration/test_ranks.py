"""Several processes that train one model together, beside one that does it alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny import BERT, QWEN3
from tests.waiting import until
from worker.launch import LocalChild, LocalTeam, processes_for

pytestmark = pytest.mark.more
WORDS = {"bill": "invoice payment refund", "login": "password account locked", "parcel": "delivery box late"}
# Labels of different sizes, and a number of rows that leaves a batch of one at each epoch's end.
TABLE = "text,label\n" + "".join(
    f"{words.split()[i % 3]} number {'very ' * (i % 5)}{i} about my {words.split()[(i + 1) % 3]},{label}\n"
    for n, (label, words) in enumerate(WORDS.items())
    for i in range(24 * (n + 1))
)
TRAIN = {"epochs": 3, "batch_size": 16, "lora_dropout": 0, "precision": "fp32", "early_stopping_patience": 0,
         "class_weights": "balanced", "learning_rate": 0.01, "max_length": 64}  # fmt: skip


def job(folder: Path, models_dir: Path, base: str) -> Path:
    folder.mkdir()
    (folder / "dataset").write_text(TABLE)
    spec = {"kind": "train", "base_model": base, "train": TRAIN}
    (folder / "job.json").write_text(
        json.dumps({"spec": spec, "models_dir": str(models_dir), "checkpoint_seconds": 0.01})
    )
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]


def assert_same_curve(one: Path, other: Path) -> None:
    curves = [log_of(folder) for folder in (one, other)]
    assert [line["epoch"] for line in curves[0]] == [line["epoch"] for line in curves[1]]
    for name in ("train_loss", "validation_loss"):
        values = [[line[name] for line in curve if name in line] for curve in curves]
        assert len(values[0]) > 3
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def followed(child: LocalChild | LocalTeam) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []

    def ended() -> bool:
        over = child.ended() is not None
        said.extend(child.messages(0))
        return over

    until(ended, 120, "it ends")
    child.kill()
    return said


@pytest.fixture
def alone(tmp_path: Path, tiny_models: Path) -> Path:
    folder = job(tmp_path / "alone", tiny_models, BERT)
    child = LocalChild(folder, {"OMP_NUM_THREADS": "1"})
    followed(child)
    assert child.ended() == 0, (folder / "log.txt").read_text()
    return folder


@pytest.mark.parametrize("base", [BERT, QWEN3])
def test_two_ranks_under_torchrun_have_the_loss_curve_of_one(tmp_path: Path, tiny_models: Path, base: str) -> None:
    one, two = (job(tmp_path / name, tiny_models, base) for name in ("one", "two"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for before, folder in (((), one), (torchrun, two)):
        ended = subprocess.run(
            [sys.executable, *before, "-m", "worker.run", str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    assert_same_curve(one, two)


def test_a_rank_that_is_killed_ends_the_attempt_and_one_process_goes_on(
    tmp_path: Path, tiny_models: Path, alone: Path
) -> None:
    folder = job(tmp_path / "team", tiny_models, BERT)
    assert processes_for(folder, 2) == 2
    team = LocalTeam(folder, 2)
    until(lambda: [m for m in team.messages(0.2) if m["type"] == "checkpoint" and "step-0" not in m["folder"]], 120,
          "it has trained some steps")  # fmt: skip
    [other] = [
        found for found in psutil.Process().children()
        if str(folder) in found.cmdline() and found.environ().get("RANK") == "1"
    ]  # fmt: skip
    other.send_signal(signal.SIGKILL)
    followed(team)
    assert team.ended() in (-signal.SIGKILL, os.EX_TEMPFAIL), "an attempt that is lost, and not a job that failed"
    child = LocalChild(folder)
    said = followed(child)
    assert child.ended() == 0, (folder / "log.txt").read_text()
    assert any("Training goes on from its checkpoint: epoch" in str(m.get("message")) for m in said)
    assert_same_curve(alone, folder)


class ShortOfMemory(LocalChild):
    """Whose second rank cannot compute more than four rows at once."""

    program = (
        "-c",
        "import os, sys, torch; from worker.methods.parts import Parts; from worker.run import main\n"
        "compute = Parts.compute\n"
        "def short(self, part):\n"
        "    if os.environ['RANK'] == '1' and len(part.rows) > 4: raise torch.OutOfMemoryError('no more')\n"
        "    return compute(self, part)\n"
        "Parts.compute = short; sys.exit(main(sys.argv[1:]))",
    )


def test_a_rank_that_runs_out_of_memory_makes_all_take_less(
    tmp_path: Path, tiny_models: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job(tmp_path / "short", tiny_models, BERT)
    monkeypatch.setattr("worker.launch.LocalChild", ShortOfMemory)
    team = LocalTeam(folder, 2)
    said = followed(team)
    assert team.ended() == 0, (folder / "log.txt").read_text()
    told = [m["message"] for m in said if "memory ran out" in str(m.get("message"))]
    assert [text.split(": ")[1].split(" rows")[0] for text in told] == ["8 of a batch's 16", "4 of a batch's 16"]
    assert_same_curve(alone, folder)


class Faulty(LocalChild):
    """Whose second rank cannot add up, as where NCCL has failed it while the first waits."""

    program = (
        "-c",
        "import os, sys; from service.core import logs; logs.configure('info', 'text')\n"
        "import torch.distributed as dist; from worker.run import main\n"
        "def faulty(*_): raise RuntimeError('NCCL error')\n"
        "if os.environ['RANK'] == '1': dist.all_reduce = faulty\n"
        "sys.exit(main(sys.argv[1:]))",
    )


def test_a_rank_that_fails_by_itself_says_where_and_ends_the_attempt(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job(tmp_path / "faulty", tiny_models, BERT)
    monkeypatch.setattr("worker.launch.LocalChild", Faulty)
    team = LocalTeam(folder, 2)
    followed(team)
    assert team.ended() in (-signal.SIGKILL, os.EX_TEMPFAIL)
    assert team._others[0].ended() == os.EX_TEMPFAIL
    log = (folder / "log.txt").read_text()
    assert "rank 1 fails" in log
    assert "in faulty" in log


def test_what_does_not_train_has_one_process(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"spec": {"kind": "baseline"}}')
    assert processes_for(tmp_path, 8) == 1
