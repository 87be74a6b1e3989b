"""What one API process takes on at once. Past it a call is refused before it costs anything; what was taken goes on."""

import contextlib
import time
from collections.abc import Callable, Iterator
from math import ceil

from service.core.errors import AppError, RateLimited

_BURST_SECONDS, _ROUNDING = 10.0, 1e-6


class Places:
    """So many at once. Used from one event loop.

    Args:
        most: How many there are: calls, or bytes.
        refusal: Raised where what is asked for is not free, with
        detail: That.
    """

    def __init__(self, most: int, refusal: type[AppError], detail: str) -> None:
        self.most, self.taken, self._refusal, self._detail = most, 0, refusal, detail

    @contextlib.contextmanager
    def hold(self, n: int = 1) -> Iterator[Callable[[int], None]]:
        """Takes `n` places, and more by what it gives, until its block is left."""
        held = 0

        def take(n: int) -> None:
            nonlocal held
            if self.taken + n > self.most:
                raise self._refusal(self._detail)
            self.taken += n
            held += n

        try:
            take(n)
            yield take
        finally:
            self.taken -= held


class Pace:
    """How fast each caller may call, on average over ten seconds; 0 a second is no limit. On the monotonic clock.

    Source: the generic cell rate algorithm, ITU-T I.371.
    """

    def __init__(self, a_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._a_second, self._monotonic = a_second, monotonic
        self._paid_until: dict[str, float] = {}

    def count(self, caller: str) -> None:
        """One call more. Raises RateLimited, with the seconds to wait."""
        if not self._a_second:
            return
        now = self._monotonic()
        paid_until = max(self._paid_until.get(caller, now), now) + 1 / self._a_second
        early = paid_until - now - max(_BURST_SECONDS, 1 / self._a_second)
        if early > _ROUNDING:
            raise RateLimited(
                f"A key may make {self._a_second:g} calls a second (TUNEPROOF_RATE_LIMIT), on average over "
                f"{_BURST_SECONDS:g} s. Ask less often.",
                retry_after_seconds=ceil(early),
            )
        self._paid_until[caller] = paid_until
