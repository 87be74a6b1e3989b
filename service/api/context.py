"""What the routes work with, and who may call them."""

import asyncio
import contextlib
import ipaddress
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from service.api.overload import Pace, Places
from service.api.problems import from_pydantic
from service.api.recent import Recent
from service.core.clock import Clock, Steadiness
from service.core.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    LowDisk,
    QueueFull,
    TooLarge,
    TooManyStreams,
    Unauthorized,
)
from service.core.settings import Settings
from service.db import catalog, sessions
from service.db.engine import Database
from service.db.models import ApiKey
from service.inference.handle import EngineHandle
from service.storage import Storage


@dataclass
class Context:
    """Built once in `main.py`."""

    settings: Settings
    db: Database
    storage: Storage
    engine: EngineHandle
    clock: Clock
    recent: Recent = field(init=False)
    steady: Steadiness = field(init=False)
    stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    streams: Places = field(init=False)
    uploads: Places = field(init=False)
    predict_bytes: Places = field(init=False)
    pace: Pace = field(init=False)
    looking: dict[Any, asyncio.Task[Any]] = field(default_factory=dict, init=False)
    _keys_exist: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.recent, settings = Recent(self.db), self.settings
        self.steady = Steadiness(self.clock, settings.lease_seconds)
        self.pace = Pace(settings.rate_limit)
        self.streams = Places(
            settings.max_event_streams,
            TooManyStreams,
            "All event streams and long polls of this process (TUNEPROOF_MAX_EVENT_STREAMS) are taken. Ask again in a "
            "moment, or poll GET /jobs/{id}.",
        )
        self.uploads = Places(
            settings.max_uploads,
            QueueFull,
            "This process is reading as many uploads as it may (TUNEPROOF_MAX_UPLOADS). Send yours again in a moment.",
        )
        self.predict_bytes = Places(
            settings.predict_body_bytes, QueueFull,
            "The texts of other calls take what memory they may (TUNEPROOF_PREDICT_BODY_BYTES). Send yours again in a "
            "moment.",
        )  # fmt: skip

    @property
    def grace(self) -> timedelta:
        return timedelta(seconds=self.settings.delete_grace_seconds)

    def keys_exist(self) -> bool:
        """Whether a key was ever created; once true, it stays so."""
        self._keys_exist = self._keys_exist or self.recent.get(_ANY_KEY, lambda: catalog.any_key_ever(self.db))
        return self._keys_exist

    async def pause(self, seconds: float) -> bool:
        """Waits, less long where the server stops meanwhile; gives whether it does."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
        return self.stopping.is_set()

    def refuse_on_low_disk(self, coming: int = 0) -> None:
        """`coming` are the bytes of an upload that is about to be read. Raises LowDisk."""
        free, least = shutil.disk_usage(self.settings.data_dir).free, self.settings.min_free_bytes
        if free < least + _COPIES * coming:
            wanted = f", and this upload takes {_COPIES * coming / 2**20:,.1f} for a moment" if coming else ""
            raise LowDisk(
                f"Only {free // 2**20} MiB are free on the service's disk, {least // 2**20} are kept back "
                f"(TUNEPROOF_MIN_FREE_BYTES){wanted}. Delete datasets or jobs, or give it more space."
            )


async def get_context(request: Request) -> Context:  # async, as others take a thread, and there may be none
    context: Context = request.app.state.context
    return context


Answer = TypeVar("Answer")
Ctx = Annotated[Context, Depends(get_context)]
Limit = Annotated[int, Query(ge=1, le=200, description="How many, newest first.")]


def after(prefix: str) -> Any:
    """The query parameter `after`: an id of that kind."""
    return Annotated[str | None, Query(pattern=rf"^{prefix}_[0-9a-z]{{1,60}}$", description="The last id seen.")]


def scope_of(request: Request) -> str | None:
    """The scope a route needs: by name where it is special, else `read` to look and `write` to change."""
    name = getattr(request.scope.get("route"), "name", "")
    if name in PUBLIC:
        return None
    return SPECIAL.get(name, "read" if request.method in ("GET", "HEAD") else "write")


PUBLIC = {
    "healthz", "readyz", "home", "get_session", "open_session", "end_session",
    "custom_swagger_ui_html", "swagger_ui_redirect",
}  # fmt: skip
SPECIAL = {"predict": "predict", "list_keys": "admin", "create_key": "admin", "revoke_key": "admin"}
SESSION_COOKIE = "tuneproof_session"
_COPIES = 3  # of an upload, for a moment: as it comes in, as it is read, in the storage
_ANY_KEY = "whether a key was ever created"


@dataclass(frozen=True)
class Caller:
    """Who calls: the holder of a key, or, while no key was ever created, whoever is on this machine (`key` is None)."""

    scope: str
    key: ApiKey | None


async def authorize(request: Request, ctx: Ctx) -> None:
    """Lets a call through whose key reaches far enough, and leaves who it is in `request.state.caller`.

    Raises:
        Unauthorized: no key, or one that is unknown, revoked or expired.
        Forbidden: its scope is too small, or another site's page sent it with the cookie.
        RateLimited: it calls faster than a key may.
    """
    needed = scope_of(request)
    if needed is None:
        return
    secret = _bearer(request)
    known = ctx.recent.held(_ANY_KEY if secret is None else _name_of(secret)) is not None
    if known and (secret is not None or SESSION_COOKIE not in request.cookies):
        caller = caller_of(request, ctx)  # blocks nobody
    else:
        caller = await run_in_threadpool(caller_of, request, ctx)
    request.state.caller = caller
    ctx.pace.count("" if caller.key is None else caller.key.id)
    if catalog.SCOPES.index(caller.scope) < catalog.SCOPES.index(needed):
        raise Forbidden(f"This call needs a key of scope '{needed}'; this one has '{caller.scope}'.")


def caller_of(request: Request, ctx: Context) -> Caller:
    """By the `Authorization` header, else the session's cookie, else loopback while no key was ever created.

    Raises:
        Unauthorized: none of these lets the call in.
        Forbidden: the cookie would, but the call changes something and comes from another site's page.
    """
    if (secret := _bearer(request)) is not None:
        key = ctx.recent.get(_name_of(secret), lambda: _key_of(ctx, secret))
        if key is not None and catalog.is_live(key, ctx.clock()):
            return Caller(key.scope, key)
        raise Unauthorized("The key is unknown, revoked or expired. Make one with `tuneproof keys create`.")
    if token := request.cookies.get(SESSION_COOKIE):
        with ctx.db.read() as session:
            key = sessions.key_of(session, token, ctx.clock())
        if key is not None:
            if request.method not in ("GET", "HEAD"):
                refuse_other_sites(request)
            return Caller(key.scope, key)
    # Without keys whoever is on this machine is let in, but not a page of another site in this machine's browser.
    if not ctx.keys_exist() and _is_loopback(request) and _is_local_name(request) and not _from_another_site(request):
        return Caller("admin", None)
    raise Unauthorized(
        "Send a key: `Authorization: Bearer <key>`, or sign in with it (POST /session). Make one with "
        "`tuneproof keys create`."
    )


def _bearer(request: Request) -> str | None:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() or None if kind.lower() == "bearer" else None


def _name_of(secret: str) -> tuple[str, str]:
    """What a key is remembered by: not its secret."""
    return "key", catalog.hash_of(secret)


def _key_of(ctx: Context, secret: str) -> ApiKey | None:
    with ctx.db.read() as session:
        return catalog.find_key(session, secret, ctx.clock())


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What `work` gives; it is cancelled where the caller hangs up before. The body must have been read.

    Raises:
        Conflict: the caller is gone, so nobody will read this.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Conflict("The caller left before the answer was there.")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refuse_other_sites(request: Request) -> None:
    if _from_another_site(request):
        raise Forbidden(
            "A page of another site sent this call (by Sec-Fetch-Site, or by an Origin that is not the Host). Call "
            "from the service's own pages or with `Authorization: Bearer <key>`; a proxy must pass on the Host header."
        )


def _from_another_site(request: Request) -> bool:
    """What the browser says of the page that sent the call; programs say nothing.

    Source: Filippo Valsorda, "Cross-Site Request Forgery", 2025 (the algorithm of Go's CrossOriginProtection).
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    host = request.headers.get("host", "").lower()
    return origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}")


def _is_loopback(request: Request) -> bool:
    try:
        return request.client is None or ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False  # a proxy that passes on what is no address: who knows where that comes from


def _is_local_name(request: Request) -> bool:
    """Whether the Host asked for is an address or a name of this network.

    A stranger's page can have its own domain name resolve to 127.0.0.1; the browser then takes us for its own site.
    """
    asked = request.headers.get("host", "")
    host = (asked.rpartition(":")[0] or asked).strip("[]").lower()
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return "." not in host or host.endswith(".localhost")


Body = TypeVar("Body", bound=BaseModel)


def takes(**schemas: str) -> dict[str, Any]:
    """For the OpenAPI document: the body of a route that reads it itself, by kind of content, `json` or `form`."""
    kinds = {"json": "application/json", "form": "multipart/form-data"}
    content = {kinds[kind]: {"schema": {"$ref": f"#/components/schemas/{name}"}} for kind, name in schemas.items()}
    return {"requestBody": {"content": content, "required": True}}


def json_body(
    model: type[Body], max_bytes: int, take: Callable[[int], None] = lambda _n: None
) -> Callable[..., Awaitable[Body]]:
    """A dependency that reads the body as `model`; `take` is told of its bytes as they come.

    Pydantic parses the bytes itself: NaN, Infinity, lone surrogates, huge numbers and deep nesting are refused there.
    """

    async def read(request: Request) -> Body:
        return parse_json(model, await _bytes(request, max_bytes, take))

    return read


def parse_json(model: type[Body], raw: bytearray | str) -> Body:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise from_pydantic(error, model) from None


async def _bytes(request: Request, max_bytes: int, take: Callable[[int], None]) -> bytearray:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidInput(f"Expected a body of type application/json, found {kind[:100]!r}.")
    raw = bytearray()
    async for chunk in request.stream():
        if len(raw) + len(chunk) > max_bytes:
            raise TooLarge(f"The JSON body is larger than the {max_bytes} bytes taken here.")
        take(len(chunk))
        raw += chunk
    return raw
