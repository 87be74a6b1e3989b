"""A server that speaks chat/completions over real HTTP, and misbehaves on request."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.threaded_server import answering

KEY = "sk-very-secret"
JSON = {"Content-Type": "application/json"}


def completion(content: str | None = "billing", usage: tuple[int, int] | None = (10, 2), **choice: Any) -> str:
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(body)


@dataclass
class Reply:
    """One answer.

    Args:
        body: As it goes over the wire.
        status: Of HTTP.
        headers: On top of the usual ones.
        hangs: Nothing is said until the server stops.
        breaks: The connection is closed in the middle of the body.
        drips: After the headers comes a blank every few milliseconds, for ever, as some providers keep a line open.
    """

    body: str = field(default_factory=completion)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    breaks: bool = False
    drips: bool = False


Script = Callable[[int, dict[str, Any]], Reply]


@dataclass
class ChatServer:
    """What it is to say, and what it saw."""

    url: str
    script: Script = lambda _n, _body: Reply()
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    def texts(self) -> list[str]:
        return [request["messages"][1]["content"] for request in self.requests]


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """One on a free port of 127.0.0.1, gone when the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                n = len(server.requests)
                server.requests.append(body)
                server.headers.append({key.lower(): value for key, value in self.headers.items()})
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                self.reply(server.script(n, body))
            except OSError:  # the client went first
                self.close_connection = True

        def reply(self, reply: Reply) -> None:
            if reply.hangs:
                server.stopping.wait()
            data = reply.body.encode()
            with server.lock:
                server.at_once -= 1
            self.send_response(reply.status)
            length = 1_000_000 if reply.drips or reply.breaks else len(data)
            for name, value in ({"Content-Length": str(length)} | JSON | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            while reply.drips and not server.stopping.wait(0.005):
                self.wfile.write(b" ")
                self.wfile.flush()
            self.wfile.write(data[: len(data) // 2] if reply.breaks else data)
            self.close_connection = reply.breaks or reply.drips

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with answering(Handler) as origin:
        server = ChatServer(f"{origin}/v1")
        try:
            yield server
        finally:
            server.stopping.set()
