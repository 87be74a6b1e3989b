"""What is measured of a machine is measured once."""

import json
from pathlib import Path

import pytest
import torch

from service.ml import device


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The measures taken, on a CPU that has the instructions and is twice as fast in bf16."""
    taken: list[torch.dtype] = []

    def seconds(dtype: torch.dtype) -> float:
        taken.append(dtype)
        return 1.0 if dtype == torch.float32 else 0.5

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device, "_matmul_seconds", seconds)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return taken


def pays_in_a_new_process() -> bool:
    device.bf16_pays_on_cpu.cache_clear()
    try:
        return device.bf16_pays_on_cpu()
    finally:
        device.bf16_pays_on_cpu.cache_clear()


def test_whether_bf16_pays_is_measured_once_for_a_cpu_and_a_version_of_torch(
    measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert pays_in_a_new_process()
    assert pays_in_a_new_process()
    assert len(measured) == 2
    monkeypatch.setattr(device, "_cpu_name", lambda: "another")
    assert pays_in_a_new_process()
    assert len(measured) == 4
    [file] = (tmp_path / "tuneproof").iterdir()
    assert list(json.loads(file.read_text()).values()) == [True, True]


@pytest.mark.parametrize("kept", ["", "[]", '{"x": ', "{}"])
def test_what_is_kept_and_cannot_be_read_is_measured_again(
    measured: list[torch.dtype], tmp_path: Path, kept: str
) -> None:
    (tmp_path / "tuneproof").mkdir()
    (tmp_path / "tuneproof" / "bf16-pays.json").write_text(kept)
    assert pays_in_a_new_process()
    assert len(measured) == 2


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(
    measured: list[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert pays_in_a_new_process()
    assert pays_in_a_new_process()
    assert len(measured) == 4
