"""What a running job says about itself: JSON lines to whoever started it."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

# Shares of the whole, by rough experience; a kind that leaves a stage out gives its share to the others.
STAGES = {"prepare": 0.03, "baseline": 0.22, "train": 0.62, "evaluate": 0.1, "publish": 0.03}
_LEAST_SECONDS_BETWEEN = 0.25


class Reporter:
    """Progress that never falls, and events, written to `stream`.

    Args:
        stream: Gets one JSON object per line.
        clock: Seconds, monotonic.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._started, self._last = stream, clock, clock(), -1.0
        self._shares: Mapping[str, float] = STAGES
        self._stage, self._fraction, self._found = "prepare", 0.0, 0.0

    def leave_out(self, **stages: bool) -> None:
        """Stages this job does not have, by name."""
        self.weigh({name: share for name, share in STAGES.items() if not stages.get(name)})

    def weigh(self, shares: Mapping[str, float]) -> None:
        """The stages this job has, in order, and their shares of the whole."""
        self._shares = shares

    def stage(self, name: str) -> None:
        self._stage = name
        self.progress(0.0, name, always=True)

    def progress(self, share: float, message: str, *, always: bool = False, eta_seconds: float | None = None) -> None:
        """`share` of the stage at hand is done; `eta_seconds` where the caller knows better than by the whole."""
        now = self._clock()
        if not always and now - self._last < _LEAST_SECONDS_BETWEEN:
            return
        self._last = now
        self._fraction = max(self._fraction, self._whole(min(max(share, 0.0), 1.0)))
        done = self._fraction - self._found
        if eta_seconds is None and done > 0.05:
            eta_seconds = (now - self._started) * (1 - self._fraction) / done
        self._send("progress", stage=self._stage, fraction=self._fraction, message=message, eta_seconds=eta_seconds)

    def goes_on(self, share: float, message: str) -> None:
        """Says where from; what earlier attempts did of the stage at hand, `share`, took this one no time."""
        self._found = self._whole(share) - self._fraction
        self.event("message", message)

    def part(self, start: float, stop: float) -> Callable[[float, str], None]:
        """A progress callback for the piece of the stage from `start` to `stop`."""
        return lambda share, message: self.progress(start + share * (stop - start), message)

    def event(self, kind: str, message: str, data: Mapping[str, Any] | None = None, level: str = "info") -> None:
        self._send("event", level=level, kind=kind, message=message, data=dict(data or {}))

    def spec(self, spec: Mapping[str, Any]) -> None:
        self._send("spec", spec=dict(spec))

    def checkpoint(self, folder: Path) -> None:
        self._send("checkpoint", folder=str(folder))

    def result(self, summary: Mapping[str, Any], models: list[dict[str, Any]]) -> None:
        self._send("result", summary=dict(summary), models=models)

    def error(self, code: str, message: str, hint: str | None) -> None:
        self._send("error", code=code, message=message, hint=hint)

    def _whole(self, share: float) -> float:
        names = list(self._shares)
        done = sum(self._shares[name] for name in names[: names.index(self._stage)])
        return (done + share * self._shares[self._stage]) / sum(self._shares.values())

    def _send(self, message_type: str, **body: Any) -> None:
        self._stream.write(json.dumps({"type": message_type, **body}, ensure_ascii=True) + "\n")
        self._stream.flush()
