"""What API and engine process say to each other: JSON in frames of a 4-byte length."""

import asyncio
import json
import struct
from dataclasses import dataclass, field
from typing import IO, Any

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of texts in a batch; the last is the most that an engine takes into one."""
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class ServedModel:
    """What the engine needs to know of a published model.

    Args:
        id: The model's.
        base_model: Name on the allow-list.
        base_revision: The one it was trained on; another will not do.
        storage_prefix: Where its files lie.
        files: Their names.
    """

    id: str
    base_model: str
    base_revision: str
    storage_prefix: str
    files: tuple[str, ...]


@dataclass
class Figures:
    """What an engine process has done since its start, and what it holds now.

    Args:
        texts: Scored.
        tokens: Scored.
        batches: How many held so many texts, by `BATCH_BUCKETS`, and one for more.
        adapter_hits: Adapters asked for that were in memory.
        adapter_misses: Those that were read from the storage.
        adapter_evictions: Those that made room for others.
        adapter_bytes: Of the adapters in memory.
        bases: Names of the base models in memory.
        base_bytes: Of those.
        loading: Names of the base models being loaded.
        refused: Why a base model is not served, by its name.
        gpu_allocated_bytes: Of this process's tensors; None without CUDA.
        gpu_reserved_bytes: What it keeps of the GPU's memory for them; None without CUDA.
    """

    texts: int = 0
    tokens: int = 0
    batches: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BUCKETS) + 1))
    adapter_hits: int = 0
    adapter_misses: int = 0
    adapter_evictions: int = 0
    adapter_bytes: int = 0
    bases: list[str] = field(default_factory=list)
    base_bytes: int = 0
    loading: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    gpu_allocated_bytes: int | None = None
    gpu_reserved_bytes: int | None = None


def pack(message: dict[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


def read(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None where the other side is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = stream.read(_LENGTH.unpack(head)[0])
    message: dict[str, Any] = json.loads(body)
    return message


async def read_async(stream: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message, or None where the other side is gone."""
    try:
        head = await stream.readexactly(_LENGTH.size)
        message: dict[str, Any] = json.loads(await stream.readexactly(_LENGTH.unpack(head)[0]))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message
