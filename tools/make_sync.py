"""Writes `tuneproof/sync` from `tuneproof/aio`: the same client without `await`. A test holds the two together."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

ROOT = Path(__file__).parent.parent
WRITTEN, MADE = ROOT / "tuneproof" / "aio", ROOT / "tuneproof" / "sync"
CLASSES = ("Transport", "Client", "Datasets", "Jobs", "Models", "Aliases", "BaseTransport")
NAMES = {f"Async{name}": name for name in CLASSES} | {
    "aio": "sync", "anyio": "time", "aclose": "close", "aread": "read", "aiter_bytes": "iter_bytes",
    "aiter_sse": "iter_sse",
}  # fmt: skip
# A module that is not written yet would pass for somebody else's.
_OURS = 'lint.isort.known-first-party = ["tuneproof"]'
HEADER = "# Made by tools/make_sync.py from tuneproof/aio; change it there.\n"


def made() -> dict[str, str]:
    """What each file of `tuneproof/sync` should hold, by name."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copytree(WRITTEN, Path(folder) / "aio", ignore=shutil.ignore_patterns("__pycache__")))
        names = sorted(path.name for path in copied.glob("*.py") if path.name != "__init__.py")
        rule = unasync.Rule(f"{folder}/aio/", f"{folder}/sync/", NAMES)
        unasync.unasync_files([f"{folder}/aio/{name}" for name in names], [rule])
        found = {name: _tidy(name, HEADER + Path(folder, "sync", name).read_text("utf-8")) for name in names}
    return {"__init__.py": HEADER + '"""The client without `await`."""\n', **found}


def _tidy(name: str, source: str) -> str:
    tidied = ["check", "--fix", "--unsafe-fixes", "--quiet", "--select", "I,UP028", "--config", _OURS]
    for words in (tidied, ["format"]):
        command = [sys.executable, "-m", "ruff", *words, "--stdin-filename", str(MADE / name), "-"]
        source = subprocess.run(command, input=source, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return source


if __name__ == "__main__":
    for file, content in made().items():
        (MADE / file).write_text(content, "utf-8")
