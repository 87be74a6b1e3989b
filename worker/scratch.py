"""Folders that a process has for itself while it lives."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path


def remove(folder: Path) -> None:
    """Takes it away at once, so that whoever reads it misses all of it, and then its files."""
    gone = folder.with_name(f"{folder.name}.partial")
    with contextlib.suppress(OSError):
        folder.replace(gone)
    for each in (gone, folder):
        shutil.rmtree(each, ignore_errors=True)


@contextlib.contextmanager
def own_folder(root: Path, name: str) -> Iterator[Path]:
    """A folder for this process's scratch; those of processes that have died are removed."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with (root / "lock").open("w") as turn:  # or a folder could be taken for a dead one's before it is locked
            fcntl.flock(turn, fcntl.LOCK_EX)
            for other in root.iterdir():
                with contextlib.suppress(OSError), (other / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)
            own = root / name
            own.mkdir()
            fcntl.flock(held.enter_context((own / "lock").open("w")), fcntl.LOCK_EX)
        yield own
    shutil.rmtree(own, ignore_errors=True)
