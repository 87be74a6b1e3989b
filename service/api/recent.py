"""What every call would look up again: whose key it is, and what stands behind a model's name."""

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from service.db.engine import Database

SECONDS = 1.0
"""How long another process's write may go unseen; this process's own counts at once."""
_MOST = 10_000
Found = TypeVar("Found")


class Recent:
    """What was looked up a moment ago, while this process has written nothing since. None is not kept."""

    def __init__(self, db: Database, now: Callable[[], float] = time.monotonic) -> None:
        self._db, self._now = db, now
        self._held: dict[Hashable, tuple[Any, int, float]] = {}

    def held(self, name: Hashable) -> Any | None:
        """What is held under `name`; blocks nobody."""
        found, writes, until = self._held.get(name, (None, 0, 0.0))
        return found if writes == self._db.writes and self._now() < until else None

    def get(self, name: Hashable, look: Callable[[], Found], seconds: float = SECONDS) -> Found:
        """What is held under `name`, or what `look` finds now."""
        held: Found | None = self.held(name)
        if held is not None:
            return held
        # Both taken before looking: what is written meanwhile may not have been seen.
        writes, until = self._db.writes, self._now() + seconds
        found = look()
        if found is not None:
            if len(self._held) >= _MOST:
                self._held.clear()
            self._held[name] = found, writes, until
        return found
