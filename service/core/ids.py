"""Ids: prefixed, opaque, sortable by creation."""

import secrets
import time
from typing import Literal

Prefix = Literal["ds", "job", "mdl", "key", "wrk", "msg"]


def new_id(prefix: Prefix) -> str:
    """`prefix_` and 26 hex digits: 13 of microseconds since 1970, 13 random ones.

    Ids of one process are strictly increasing as long as its clock is; two made in the same microsecond stand in
    random order.
    """
    return f"{prefix}_{time.time_ns() // 1000:013x}{secrets.token_hex(7)[:13]}"


def new_token() -> str:
    """A random string that nobody can guess; fences leases and names storage keys."""
    return secrets.token_hex(8)
