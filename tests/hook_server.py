"""A receiver of webhooks over real HTTP, which misbehaves on request."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.threaded_server import answering


@dataclass(frozen=True)
class Call:
    path: str
    headers: dict[str, str]
    body: str


@dataclass
class HookServer:
    """What it is to answer, and what it saw.

    Args:
        origin: `http://127.0.0.1:PORT`.
        answer: Status of the nth call, from 0; None says nothing until the server stops, -1 closes the connection.
        headers: On top of the usual ones.
        drips: The body is a blank every few milliseconds, for ever.
    """

    origin: str
    answer: Callable[[int], int | None] = lambda _n: 204
    headers: dict[str, str] = field(default_factory=dict)
    drips: bool = False
    calls: list[Call] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"{self.origin}/hook?token=hook-token-canary"


@contextmanager
def hook_server() -> Iterator[HookServer]:
    """One on a free port of 127.0.0.1, gone when the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            with server.lock:
                n = len(server.calls)
                server.calls.append(Call(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            status = server.answer(n)
            self.close_connection = True
            if status is None:
                server.stopping.wait()
            elif status >= 0:
                self.send_response(status)
                for name, value in ({"content-length": "1000000" if server.drips else "0"} | server.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    while server.drips and not server.stopping.wait(0.005):
                        self.wfile.write(b" ")
                except OSError:  # the caller went, as it should
                    pass

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with answering(Handler) as origin:
        server = HookServer(origin)
        try:
            yield server
        finally:
            server.stopping.set()
