"""Stands in for `worker.child`: a fifth of a second of work, sometimes cut short by its own death. No imports of ours.

`python chaos_child.py FOLDER`; whatever it leaves carries the nonce of its attempt, so that no two can be mixed.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

DIES = 0.15


def say(kind: str, **body: object) -> None:
    print(json.dumps({"type": kind, **body}), flush=True)


def die_with_supervisor() -> None:
    while os.read(0, 4096):
        pass
    os._exit(os.EX_TEMPFAIL)


def work(chance: random.Random) -> None:
    """Or the end of it."""
    time.sleep(0.03)
    if chance.random() < DIES / 4:
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    threading.Thread(target=die_with_supervisor, daemon=True).start()
    if "poison" in json.loads((folder / "job.json").read_text())["dataset"]["name"]:
        os.kill(os.getppid(), signal.SIGKILL)
    chance, nonce = random.Random(), os.urandom(16).hex()
    work(chance)
    checkpoint = folder / "checkpoints" / f"step-{nonce}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(nonce)
    say("progress", stage="train", fraction=0.5, message="half", eta_seconds=0.1)
    say("checkpoint", folder=str(checkpoint))
    work(chance)
    out = folder / "out"
    (out / "adapter").mkdir(parents=True)
    manifest = {"base_model": "minilm", "base_revision": "sha256:0", "labels": ["a", "b"], "nonce": nonce}
    for name in ("metrics.json", "report.html", "adapter/manifest.json"):
        (out / name).write_text(json.dumps(manifest))
        work(chance)
    figures = {"accuracy": 0.9, "macro_f1": 0.8, "on": "test", "model_id": None}
    summary = {"headline": nonce, "methods": {"lora": figures}}
    say("result", summary=summary, models=[{"method": "lora", "folder": "out/adapter"}])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
