"""What every call would look up again: whose key it is, and what stands behind a model's name."""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from service.db.engine import Database

SECONDS = 1.0
"""How long another process's write may go unseen; this process's own counts at once."""
SECONDS_OF_AN_ID = 3600.0
"""How long a model's row is kept while no deletion is counted; it never changes, but databases are restored."""
_MOST = 10_000
Found = TypeVar("Found")


class Recent:
    """What was looked up not long ago, while nothing has happened since that may have changed it. None is not kept.

    A `stamp` counts what would have: what this process has written, unless another one is given.
    """

    def __init__(self, db: Database, now: Callable[[], float] = time.monotonic) -> None:
        self._db, self._now = db, now
        self._held: OrderedDict[Hashable, tuple[Any, int, float]] = OrderedDict()  # the least recently asked for first

    def held(self, name: Hashable, stamp: int | None = None) -> Any | None:
        """What is held under `name`; blocks nobody."""
        found, then, until = self._held.get(name, (None, 0, 0.0))
        if then != (self._db.writes if stamp is None else stamp) or self._now() >= until:
            return None
        with contextlib.suppress(KeyError):  # another thread has just let go of it
            self._held.move_to_end(name)
        return found

    def get(
        self, name: Hashable, look: Callable[[], Found], seconds: float = SECONDS, stamp: int | None = None
    ) -> Found:
        """What is held under `name`, or what `look` finds now."""
        held: Found | None = self.held(name, stamp)
        if held is not None:
            return held
        # Both taken before looking: what is written meanwhile may not have been seen.
        then, until = self._db.writes if stamp is None else stamp, self._now() + seconds
        found = look()
        if found is not None:
            self._held.pop(name, None)  # or it would keep its place
            self._held[name] = found, then, until
            if len(self._held) > _MOST:
                self._held.popitem(last=False)
        return found
