"""Runs a command and writes the largest resident size of its process, in bytes: `_peak.py FILE COMMAND...`.

A small process in between, without torch: on Linux a child starts with the size of whatever started it.
"""

import resource
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    subprocess.run(sys.argv[2:], check=True, stdout=subprocess.DEVNULL)
    unit = 1 if sys.platform == "darwin" else 1024
    Path(sys.argv[1]).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit))
