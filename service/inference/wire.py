"""What API and engine process say to each other: frames of JSON and, behind it, raw bytes (probabilities)."""

import asyncio
import json
import struct
from dataclasses import dataclass, field
from typing import IO, Any

from service.core.errors import AppError

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of texts in a batch; the last is the most that an engine takes into one."""
_LENGTHS = struct.Struct(">II")


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
        waiting_tokens: Of texts that wait to be scored.
        tokens_per_second: Of late; 0 before the first batch.
        batches: How many held so many texts, by `BATCH_BUCKETS`, and one for more.
        adapter_hits: Adapters asked for that were in memory.
        adapter_misses: Those that were read from the storage.
        adapter_evictions: Those that made room for others.
        adapter_bytes: Of the adapters in memory.
        bases: Names of the base models in memory.
        base_bytes: Of those.
        loading: Names of the base models being loaded.
        refused: Why a base model is not served, by its name.
        warmed: Of what was to be loaded at the start, how many are in memory, or cannot be.
        gpu_allocated_bytes: Of this process's tensors; None without CUDA.
        gpu_reserved_bytes: What it keeps of the GPU's memory for them; None without CUDA.
        replicas: Where replicas answer, how many; all else is then theirs to tell. None for an engine beside the API.
        away: Why no replica answers, and what to do; empty where one does.
    """

    texts: int = 0
    tokens: int = 0
    waiting_tokens: int = 0
    tokens_per_second: float = 0.0
    batches: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BUCKETS) + 1))
    adapter_hits: int = 0
    adapter_misses: int = 0
    adapter_evictions: int = 0
    adapter_bytes: int = 0
    bases: list[str] = field(default_factory=list)
    base_bytes: int = 0
    loading: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    warmed: int = 0
    gpu_allocated_bytes: int | None = None
    gpu_reserved_bytes: int | None = None
    replicas: int | None = None
    away: str = ""


def pack(message: dict[str, Any], raw: bytes = b"") -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return b"".join((_LENGTHS.pack(len(body), len(raw)), body, raw))


def told(error: AppError) -> dict[str, Any]:
    """An error as part of a message."""
    body = {"code": error.code, "detail": error.detail, "retry_after_seconds": error.retry_after_seconds}
    return {"error": body}


def read(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None where the other side is gone."""
    head = stream.read(_LENGTHS.size)
    if len(head) < _LENGTHS.size:
        return None
    body, raw = _LENGTHS.unpack(head)
    message = stream.read(body + raw)
    return _message(message, body) if len(message) == body + raw else None


async def read_async(stream: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message, or None where the other side is gone."""
    try:
        body, raw = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
        return _message(await stream.readexactly(body + raw), body)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _message(frame: bytes, body: int) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(frame[:body])
    if len(frame) > body:
        message["raw"] = frame[body:]
    return message
