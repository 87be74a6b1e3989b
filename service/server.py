"""uvicorn, which here tells the application when it is about to stop."""

import socket
import sys
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Sets the context's `stopping` before uvicorn waits for open answers.

    Event streams and long polls would otherwise hold it for all of its grace time: it tells them nothing itself.
    """

    def __init__(self, app: FastAPI, **config: Any) -> None:
        super().__init__(uvicorn.Config(app, **config))
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.context.stopping.set()
        await super().shutdown(sockets)


def run(app: FastAPI, **config: Any) -> None:
    """Serves until a signal says to stop. Exits with 3 where the application does not start."""
    server = Server(app, **config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(3)
