"""The time, as something that can be handed in."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Gives the time now, timezone-aware, in UTC."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Steadiness:
    """Whether a clock has run as evenly as the machine's own: nobody set it, and the machine did not sleep.

    At first it is not known, so it counts as unsteady: it may have been set just before.

    Args:
        clock: That is watched; it is looked at whenever this is called.
        seconds: How long after a jump it counts as unsteady. Jumps of a third of this are none.
        monotonic: In seconds; what nobody can set.
    """

    def __init__(self, clock: Clock, seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._seconds, self._monotonic = clock, seconds, monotonic
        self._ahead = self._difference()
        self._jumped = monotonic()

    def __call__(self) -> bool:
        before, self._ahead = self._ahead, self._difference()
        if abs(self._ahead - before) > self._seconds / 3:
            self._jumped = self._monotonic()
        return self._monotonic() - self._jumped > self._seconds

    def doubt(self) -> None:
        """Counts as a jump: something else kept others from doing by this clock what they were to do."""
        self._jumped = self._monotonic()

    def _difference(self) -> float:
        return self._clock().timestamp() - self._monotonic()
