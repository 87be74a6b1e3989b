"""Runs a command and writes the most bytes that it and its children have held at once: `_peak.py FILE COMMAND...`.

Looked at every tenth of a second. What processes share, such as the code of libraries, counts once.
"""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil


def held(process: psutil.Process) -> int:
    """Bytes, now."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += getattr(one.memory_full_info(), "pss", one.memory_info().rss)
    return total


if __name__ == "__main__":
    with subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL) as started:
        most, process = 0, psutil.Process(started.pid)
        while started.poll() is None:
            with suppress(psutil.NoSuchProcess):
                most = max(most, held(process))
            time.sleep(0.1)
    if started.returncode:
        sys.exit(started.returncode)
    Path(sys.argv[1]).write_text(str(most))
