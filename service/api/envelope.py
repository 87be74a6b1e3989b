"""What stands around every request, whatever route it takes."""

import asyncio
import logging
import re
import time

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import problems
from service.api.meters import Meters
from service.core import logs
from service.core.errors import TooLarge, TooSlow
from service.core.ids import new_token

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JOB_ID = re.compile(r"job_[0-9a-f]{26}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LOOKS = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds, for ever
# No other site's page may frame an answer, to have it clicked on, and no browser may take it for another type.
_HEADERS = ((b"x-frame-options", b"DENY"), (b"x-content-type-options", b"nosniff"))
_SECONDS_BETWEEN_CHUNKS = 60.0
log = logging.getLogger("tuneproof.api")
access = logging.getLogger("tuneproof.access")


class Envelope:
    """Around every request: its id, its figures, what browsers are told, the limit of its body, and what is broken."""

    def __init__(self, app: ASGIApp, meters: Meters, max_body_bytes: int) -> None:
        self.app, self.meters, self.max_body_bytes = app, meters, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{new_token()}"
        scope.setdefault("state", {})["request_id"] = request_id
        with logs.bound(request_id=request_id):
            await self._answer(scope, self._limited(headers.get(b"content-length", b"0"), receive), send, request_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        status, start, streams = 0, time.perf_counter(), False

        async def send_with_id(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = any(value.startswith(b"text/event-stream") for _name, value in message.get("headers", ()))
                message["headers"] = [*message.get("headers", []), *_HEADERS, (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log.error("request %s failed\n%s", request_id, logs.where(error))
            if status:
                raise
            answer = problems.crashed(Request(scope), error)
            await answer(scope, receive, send_with_id)
        finally:
            self._account(scope, status, time.perf_counter() - start, streams=streams)

    def _account(self, scope: Scope, status: int, seconds: float, *, streams: bool) -> None:
        """Counts the answer and logs it: by its route, as the path is whatever somebody typed."""
        mounted = scope.get("root_path", "").removeprefix(scope.get("app_root_path", ""))
        route = f"{mounted}/{{path}}" if "app_root_path" in scope else getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.meters.answered(method, route, status, None if streams else seconds)
        job_id = str(scope.get("path_params", {}).get("job_id", ""))
        job = {"job_id": job_id} if _JOB_ID.fullmatch(job_id) else {}
        level = logging.DEBUG if route in _LOOKS else logging.INFO
        with logs.bound(method=method, route=route, status=status, seconds=round(seconds, 4), **job):
            access.log(level, "%s %s %d in %.3f s", method, route, status, seconds)

    def _limited(self, declared: bytes, receive: Receive) -> Receive:
        """`receive`, raising TooLarge at once where the body says it is too large, else as soon as it is; and TooSlow.

        FastAPI's own `max_body_size` answers with plain text, which is no problem+json.
        """
        said = int(declared[:20]) if declared.isdigit() else 0  # of thousands of digits Python makes no number
        received, whole = 0, False

        async def count() -> Message:
            nonlocal received, whole
            if said <= self.max_body_bytes:
                try:  # who is gone without a word must not keep a place for ever; after the body, waiting is asked for
                    async with asyncio.timeout(None if whole else _SECONDS_BETWEEN_CHUNKS):
                        message = await receive()
                except TimeoutError:
                    raise TooSlow(
                        f"Nothing of the body came for {_SECONDS_BETWEEN_CHUNKS:g} s. Send it again."
                    ) from None
                whole = not message.get("more_body", False)
                received += len(message.get("body", b""))
                if received <= self.max_body_bytes:
                    return message
            raise TooLarge("The body is larger than this service takes; see TUNEPROOF_MAX_UPLOAD_BYTES.")

        return count
