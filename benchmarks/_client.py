"""A lean HTTP client: keep-alive connections in a process of their own, each asking again once it is answered.

As a program it reads a `Load` from standard input and writes an `Outcome` to standard output, both as JSON.
"""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_SECONDS_AFTER_REFUSAL = 0.05
_SECONDS_FOR_THE_LAST = 120.0


@dataclass
class Load:
    """What to ask and for how long.

    Args:
        port: On 127.0.0.1.
        calls: Method, path, JSON body or an empty string, and how many predictions the answer must hold; in turn.
        connections: Open at a time.
        seconds: After which nothing more is asked; without, every call is made once.
        key: Sent as a bearer.
        pause: Seconds between a connection's answer and its next call.
        allowed: Statuses other than 200 that are counted and no error.
    """

    port: int
    calls: Sequence[tuple[str, str, str, int]]
    connections: int = 1
    seconds: float | None = None
    key: str = ""
    pause: float = 0
    allowed: Sequence[str] = ()


@dataclass
class Outcome:
    """What came of it: statuses, predictions, milliseconds of each answer in order, the whole time, our own CPU's."""

    statuses: dict[str, int] = field(default_factory=dict)
    predictions: int = 0
    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0
    cpu_seconds: float = 0

    @property
    def rate(self) -> float:
        """Predictions a second, from the first call to the last answer."""
        return self.predictions / self.seconds


def ask(load: Load) -> Outcome:
    """Raises SystemExit where the client was answered what it must not be, which it has said on standard error, and
    TimeoutExpired where the last answers do not come.
    """
    asked = [sys.executable, __file__]
    told = subprocess.run(
        asked, input=json.dumps(asdict(load)), stdout=subprocess.PIPE, text=True, check=False,
        timeout=None if load.seconds is None else load.seconds + _SECONDS_FOR_THE_LAST,
    )  # fmt: skip
    if told.returncode != 0:
        raise SystemExit("the client failed")
    return Outcome(**json.loads(told.stdout))


def _raw(load: Load, call: Sequence[object]) -> tuple[bytes, int]:
    method, path, body, expected = call
    payload = str(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {load.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload, int(str(expected))


async def _connection(load: Load, calls: Iterator[tuple[bytes, int]], until: float, outcome: Outcome) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port, limit=1 << 24)
    while time.perf_counter() < until and (call := next(calls, None)) is not None:
        asked = time.perf_counter()
        writer.write(call[0])
        head = await reader.readuntil(b"\r\n\r\n")
        status, length = head[9:12].decode(), _LENGTH.search(head)
        body = await reader.readexactly(int(length[1])) if length else b""
        outcome.milliseconds.append(1000 * (time.perf_counter() - asked))
        outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
        if status in load.allowed:
            await asyncio.sleep(_SECONDS_AFTER_REFUSAL)
            continue
        if status != "200" or (found := body.count(b'"label":')) != call[1]:
            raise SystemExit(f"expected 200 with {call[1]} predictions, found {status}: {body[:300]!r}")
        outcome.predictions += found
        if load.pause:
            await asyncio.sleep(load.pause)
    writer.close()


async def _run(load: Load) -> Outcome:
    outcome, raw = Outcome(), [_raw(load, call) for call in load.calls]
    start, before = time.perf_counter(), time.process_time()
    calls = iter(raw) if load.seconds is None else itertools.cycle(raw)
    until = float("inf") if load.seconds is None else start + load.seconds
    await asyncio.gather(*(_connection(load, calls, until, outcome) for _ in range(load.connections)))
    outcome.seconds, outcome.cpu_seconds = time.perf_counter() - start, time.process_time() - before
    return outcome


if __name__ == "__main__":
    json.dump(asdict(asyncio.run(_run(Load(**json.load(sys.stdin))))), sys.stdout)
