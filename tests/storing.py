"""Whole folders in a storage."""

from pathlib import Path

from service.storage.store import Storage, Stored


def put_folder(storage: Storage, folder: Path, prefix: str) -> list[Stored]:
    """Every file below `folder`, under `prefix` and its own relative name."""
    stored = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            stored.append(storage.put(stream, f"{prefix}/{file.relative_to(folder).as_posix()}"))
    return stored
