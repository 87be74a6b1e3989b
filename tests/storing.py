"""Whole folders in a storage, and a store that hangs."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from service.storage.store import Storage, Stored


def put_folder(storage: Storage, folder: Path, prefix: str) -> list[Stored]:
    """Every file below `folder`, under `prefix` and its own relative name."""
    stored = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            stored.append(storage.put(stream, f"{prefix}/{file.relative_to(folder).as_posix()}"))
    return stored


@contextlib.contextmanager
def silent_server() -> Iterator[tuple[str, list[socket.socket]]]:
    """A host that takes every connection and says nothing. Gives its URL and the connections, as they come."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # ends `accept`, too
            thread.join()
            for connection in taken:
                connection.close()
