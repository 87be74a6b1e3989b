"""What a running job says of how far it is, and how long that may still take."""

import io
import json
from typing import Any

from worker.progress import Reporter


class Told:
    """A reporter by a clock that stands until it is set."""

    def __init__(self) -> None:
        self.now, self._said = 0.0, io.StringIO()
        self.reporter = Reporter(self._said, lambda: self.now)
        self.reporter.leave_out(baseline=True)

    def at(self, now: float, share: float) -> dict[str, Any]:
        """What is told of a share of the stage at hand, at that time."""
        self.now = now
        self.reporter.progress(share, "step", always=True)
        return json.loads(self._said.getvalue().splitlines()[-1])  # type: ignore[no-any-return]


def test_the_time_left_is_by_the_share_that_is_done() -> None:
    told = Told()
    told.reporter.stage("train")
    said = told.at(10.0, 0.5)
    assert said["eta_seconds"] * said["fraction"] == 10.0 * (1 - said["fraction"])


def test_what_an_earlier_attempt_did_is_done_but_no_measure_of_the_time_left() -> None:
    fresh, resumed = Told(), Told()
    fresh.reporter.stage("train")
    resumed.reporter.stage("train")
    resumed.reporter.goes_on(0.6, "Training goes on from its checkpoint.")
    assert resumed.at(1.0, 0.6)["eta_seconds"] is None  # nothing was measured yet
    before, after = fresh.at(20.0, 0.2), resumed.at(20.0, 0.8)
    assert after["fraction"] > before["fraction"] + 0.4
    # As much was done in as many seconds, so the pace is the same, and less is left.
    pace = before["eta_seconds"] / (1 - before["fraction"])
    assert abs(after["eta_seconds"] - pace * (1 - after["fraction"])) < 1e-9
