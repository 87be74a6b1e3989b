"""uvicorn, which here tells the application when it is about to stop."""

import ctypes
import logging
import socket
import sys
import tempfile
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.db.engine import stores

_M_ARENA_MAX = -8  # glibc's malloc.h
_MOST_HEAD_BYTES = 1 << 16
log = logging.getLogger("tuneproof.api")


class BoundedHead(HttpToolsProtocol):
    """A connection that is closed where the head of a request does not end: httptools itself keeps all of it."""

    _head_bytes, _in_head = 0, True

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > _MOST_HEAD_BYTES:
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
            self.transport.close()


class Server(uvicorn.Server):
    """Sets the context's `stopping` before uvicorn waits for open answers.

    Event streams and long polls would otherwise hold it for all of its grace time: it tells them nothing itself.
    """

    def __init__(self, app: FastAPI, **config: Any) -> None:
        super().__init__(uvicorn.Config(app, http=BoundedHead, **config))
        self.app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            settings = self.app.state.context.settings
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- to be opened, not bound
            at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            log.info("open %s in a browser; data folder %s; %s", at, settings.data_dir.absolute(), stores(settings))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.context.stopping.set()
        await super().shutdown(sockets)


def run(app: FastAPI, **config: Any) -> None:
    """Serves until a signal says to stop. Exits with 3 where the application does not start."""
    if sys.platform == "linux":
        # Dozens of threads answer, and each would fill a heap of its own, which grows by bits for hours. musl has none.
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    # Uploads come in on the disk whose room is looked at, and housekeeping finds what a killed process leaves there.
    tempfile.tempdir = str(app.state.context.settings.data_dir.absolute() / "tmp")
    server = Server(app, **config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(3)
