"""What is measured of a machine is measured once."""

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

    monkeypatch.setenv("HOME", str(tmp_path))
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
    assert [file.read_text() for file in (tmp_path / ".cache" / "tuneproof").iterdir()] == ["faster", "faster"]


def test_of_two_processes_that_measure_at_once_the_first_to_write_is_right(
    measured: list[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pays_in_a_new_process()
    [file] = (tmp_path / ".cache" / "tuneproof").iterdir()
    file.unlink()

    def meanwhile() -> bool:
        file.write_text("slower")
        return True

    monkeypatch.setattr(device, "_bf16_is_faster", meanwhile)
    assert not pays_in_a_new_process()


def test_what_is_kept_and_cannot_be_read_is_measured_again(measured: list[torch.dtype], tmp_path: Path) -> None:
    assert pays_in_a_new_process()
    [file] = (tmp_path / ".cache" / "tuneproof").iterdir()
    file.write_text("")
    assert pays_in_a_new_process()
    assert (len(measured), file.read_text()) == (4, "faster")


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(
    measured: list[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "a file"))
    assert pays_in_a_new_process()
    assert pays_in_a_new_process()
    assert len(measured) == 4
