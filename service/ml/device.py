"""Which device to compute on, and in which precision."""

import os
import platform
import tempfile
import timeit
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is CUDA, else Apple's, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def training_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it, and on every GPU: a T4 emulates it, but fp16 would need a GradScaler."""
    if device.type == "cuda":
        return "bf16"
    return "bf16" if device.type == "cpu" and bf16_pays_on_cpu() else "fp32"


def serving_precision(device: torch.device, asked: str = "auto") -> Precision:
    """What is asked for; `auto` is bf16 on a GPU of capability 8.0 on, or a CPU on which that is measured to pay.

    Answers in bf16 are some thousandths away from stock PEFT's; in fp32 they equal them.
    """
    if asked != "auto":
        return "bf16" if asked == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and bf16_pays_on_cpu() else "fp32"


@cache
def bf16_pays_on_cpu() -> bool:
    """Whether this CPU multiplies bf16 measurably faster than fp32, at the shapes of a small transformer.

    Measured once for a CPU and a version of torch, and kept in the user's cache folder: another answer tomorrow would
    be other predictions.
    """
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", None), getattr(torch.cpu, "_is_amx_tile_supported", None)
    if not any(ask() for ask in capable if ask is not None):
        return False
    key = sha256(f"{_cpu_name()}, torch {torch.__version__}".encode()).hexdigest()[:16]
    try:
        return _agreed(Path("~/.cache").expanduser() / "tuneproof" / f"bf16-{key}")
    except (OSError, RuntimeError):  # no home that can be written to: every process measures
        return _bf16_is_faster()


def _agreed(file: Path) -> bool:
    """What the file says; where it is not there yet, or says nothing, it is measured. The first to write is right."""
    for _ in range(2):
        with suppress(FileNotFoundError):
            if (said := file.read_text(encoding="ascii")) in ("faster", "slower"):
                return said == "faster"
            file.unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="ascii") as mine:
            mine.write("faster" if _bf16_is_faster() else "slower")
            mine.flush()
            with suppress(FileExistsError):
                os.link(mine.name, file)
    return file.read_text(encoding="ascii") == "faster"


def _bf16_is_faster() -> bool:
    return _matmul_seconds(torch.float32) > 1.2 * _matmul_seconds(torch.bfloat16)


def _cpu_name() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Least seconds of four (512, 384) x (384, 1536) products: other work on the machine only ever adds."""
    left, right = torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    return min(timeit.repeat(lambda: torch.mm(left, right), number=4, repeat=7))
