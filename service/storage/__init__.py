"""Bytes under keys that are ours alone, on any fsspec file system: write once, read, delete."""

from service.storage.store import Storage, Stored, StoredText

__all__ = ["Storage", "Stored", "StoredText"]
