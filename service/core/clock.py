"""The time, as something that can be handed in."""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Gives the time now, timezone-aware, in UTC."""


def utc_now() -> datetime:
    return datetime.now(UTC)
