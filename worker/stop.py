"""SIGTERM: what is being done ends, at once, or where it can be gone on from."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The process was told to stop. The last whole checkpoint stays."""


class Stop:
    """Whether to stop, and whether that can wait for the end of a step."""

    asked = False
    _waits = False

    def listen(self) -> None:
        """From here on SIGTERM raises `Stopped`, wherever the process is, once."""
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Meanwhile it does not: whoever enters this looks at `asked`, and ends. Raises Stopped at the end."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before
        if self.asked and not before:
            raise Stopped

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True  # a second one would break off what the first makes end well
        if first and not self._waits:
            raise Stopped
