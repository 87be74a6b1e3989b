"""`python -P -m worker.child FOLDER`: `worker.run` under a supervisor, with whom it dies, however that was.

The watch begins before torch is imported, which takes seconds in which nobody else would notice.
"""

import os
import sys
import threading
from pathlib import Path

from service.core import logs
from worker.scratch import remove


def _die_with_supervisor(folder: str) -> None:
    """Ends this process when the supervisor's end of standard input closes: nobody will come for its files."""
    while os.read(0, 4096):
        pass
    remove(Path(folder))  # texts would lie here until the next supervisor comes
    os._exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    threading.Thread(target=_die_with_supervisor, args=sys.argv[1:], daemon=True).start()
    logs.configure("info", "text")  # its supervisor passes on where it broke: no message may look like a part of that
    from worker.run import main

    sys.exit(main(sys.argv[1:]))
