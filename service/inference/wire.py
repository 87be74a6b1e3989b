"""What API and engine process say to each other: JSON in frames of a 4-byte length."""

import asyncio
import json
import struct
from dataclasses import dataclass
from typing import IO, Any

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
