"""The only wiring: settings in, application out."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import (
    datasets,
    events,
    evidence,
    jobs,
    keys,
    models,
    operations,
    predict,
    preflight,
    problems,
    promotion,
    session,
)
from service.api.context import Context, authorize
from service.api.meters import Meters
from service.api.schemas import AliasIn, DatasetForm, KeyIn, PredictIn, Problem, SessionIn
from service.core import logs
from service.core.clock import Clock, utc_now
from service.core.errors import TooLarge
from service.core.ids import new_token
from service.core.settings import Settings
from service.core.spec import JobSpec
from service.db import catalog, idempotency, sessions
from service.db import jobs as job_queue
from service.db.engine import Database, migrate
from service.db.models import Model
from service.inference.handle import EngineHandle
from service.inference.wire import ServedModel
from service.ml.base_models import EMBEDDED, find_base
from service.storage import Storage
from service.web.pages import Pages
from service.webhooks import Webhooks

_FORM_BYTES = 1 << 20  # the other fields and the boundaries of a multipart body
_PROBLEM: dict[str, Any] = {
    "description": "A problem, RFC 9457.",
    "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JOB_ID = re.compile(r"job_[0-9a-f]{26}")
_LOOKS = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds, for ever
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS_BETWEEN_ROUNDS = 5.0
_WARM_MODELS = 20
log = logging.getLogger("tuneproof.api")
access = logging.getLogger("tuneproof.access")


def create_app(settings: Settings | None = None, clock: Clock = utc_now) -> FastAPI:
    """The application. Its lifespan migrates the database and runs the engine process and the housekeeping."""
    settings = settings or Settings()
    (settings.data_dir / "tmp").mkdir(parents=True, exist_ok=True)
    db, storage = Database(settings.resolved_database_url), Storage(settings.resolved_storage_url)
    context = Context(settings, db, storage, EngineHandle(settings), clock)
    # FastAPI's own /docs loads its scripts from a public host.
    app = FastAPIOffline(
        title="tuneproof", redoc_url=None, lifespan=_lifespan, dependencies=[Depends(authorize)],
        responses=dict.fromkeys(("4XX", "5XX"), _PROBLEM),
        description="Prompt a model or fine-tune one? An honest verdict on your own labelled CSV, and /predict.",
    )  # fmt: skip
    app.state.context, app.state.meters = context, Meters()
    rooms = (datasets, preflight, jobs, events, evidence, models, promotion, predict, session, keys, operations)
    for room in rooms:
        app.include_router(room.router)
    app.mount("/ui", Pages(), name="ui")
    problems.install(app)
    app.add_middleware(Envelope, meters=app.state.meters, max_body_bytes=settings.max_upload_bytes + _FORM_BYTES)
    document = app.openapi
    app.openapi = lambda: _with_bodies(document())  # type: ignore[method-assign]
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    context.stopping = asyncio.Event()  # belongs to this loop
    await run_in_threadpool(migrate, context.settings.resolved_database_url)
    await run_in_threadpool(_bootstrap, context)
    warm = await run_in_threadpool(_models_to_warm, context)
    webhooks = Webhooks(context.db, context.settings, context.clock)
    rooms = (context.engine.run(warm), _housekeeping(context), webhooks.run())
    tasks = [asyncio.create_task(room) for room in rooms]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await context.engine.stop()
    context.db.close()


def _bootstrap(context: Context) -> None:
    """Stores the first key that a container was given, where there is none."""
    given = context.settings.bootstrap_key
    secret = given.get_secret_value().strip() if given is not None else ""
    if secret and not context.keys_exist():
        with context.db.write() as session:
            catalog.create_key(session, "bootstrap", "admin", context.clock(), secret=secret)


def _models_to_warm(context: Context) -> list[ServedModel]:
    """The bases of the newest models, or the embedded one: loaded before the first call asks for them."""
    with context.db.read() as session:
        newest, _more = catalog.newest(session, Model, _WARM_MODELS, None)
    bases = dict.fromkeys((model.base_model, model.base_revision) for model in newest)
    if not bases:
        bases = {(EMBEDDED, find_base(EMBEDDED, None).revision): None}
    return [ServedModel("", name, revision, "", ()) for name, revision in bases]


async def _housekeeping(context: Context) -> None:
    """Takes jobs from lost workers, deletes bytes whose grace time is over, and forgets old sessions and answers."""
    while True:
        try:
            await run_in_threadpool(_round, context)
        except Exception:
            log.exception("housekeeping failed; it is tried again")
        await asyncio.sleep(_SECONDS_BETWEEN_ROUNDS)


def _round(context: Context) -> None:
    now, settings = context.clock(), context.settings
    grace = timedelta(seconds=settings.delete_grace_seconds)
    job_queue.reap(context.db, now, settings.max_attempts, grace)
    sessions.forget_ended(context.db, now)
    idempotency.forget_old(context.db, now)
    for garbage_id, prefix in job_queue.due_garbage(context.db, now):
        try:
            context.storage.delete(prefix)
        except OSError as error:
            log.warning("%s cannot be deleted yet (%s)", prefix, type(error).__name__)
        else:
            job_queue.collected(context.db, garbage_id)


class Envelope:
    """Around every request: its id, its figures, the limit of its body, and a plain 500 where something broke."""

    def __init__(self, app: ASGIApp, meters: Meters, max_body_bytes: int) -> None:
        self.app, self.meters, self.max_body_bytes = app, meters, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{new_token()}"
        scope.setdefault("state", {})["request_id"] = request_id
        with logs.bound(request_id=request_id):
            await self._answer(scope, receive, send, request_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        headers = dict(scope["headers"])
        status, start, streams = 0, time.perf_counter(), False

        async def send_with_id(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = any(value.startswith(b"text/event-stream") for _name, value in message.get("headers", ()))
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, self._limited(headers.get(b"content-length", b"0"), receive), send_with_id)
        except Exception as error:
            log.error("request %s failed\n%s", request_id, logs.where(error))
            if status:
                raise
            answer = problems.problem(
                Request(scope), 500, "internal", "Something broke on our side; the log names it by this request's id."
            )
            await answer(scope, receive, send_with_id)
        finally:
            self._account(scope, status, time.perf_counter() - start, streams=streams)

    def _account(self, scope: Scope, status: int, seconds: float, *, streams: bool) -> None:
        """Counts the answer and logs it: by its route, as the path is whatever somebody typed."""
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.meters.answered(method, route, status, None if streams else seconds)
        job_id = str(scope.get("path_params", {}).get("job_id", ""))
        job = {"job_id": job_id} if _JOB_ID.fullmatch(job_id) else {}
        level = logging.DEBUG if route in _LOOKS else logging.INFO
        with logs.bound(method=method, route=route, status=status, seconds=round(seconds, 4), **job):
            access.log(level, "%s %s %d in %.3f s", method, route, status, seconds)

    def _limited(self, declared: bytes, receive: Receive) -> Receive:
        """`receive`, raising TooLarge at once where the body says it is too large, else as soon as it is.

        FastAPI's own `max_body_size` answers with plain text, which is no problem+json.
        """
        received = int(declared) if declared.isdigit() else 0
        too_large = TooLarge("The body is larger than this service takes; see TUNEPROOF_MAX_UPLOAD_BYTES.")
        if received > self.max_body_bytes:

            async def refuse() -> Message:
                raise too_large

            return refuse
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise too_large
            return message

        return count


def _with_bodies(document: dict[str, Any]) -> dict[str, Any]:
    """Adds the schemas of bodies that routes read themselves."""
    schemas = document["components"]["schemas"]
    if "JobUpload" not in schemas:
        bodies = [
            (model, "validation") for model in (JobSpec, PredictIn, AliasIn, SessionIn, KeyIn, DatasetForm, Problem)
        ]
        _, found = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        schemas.update(found["$defs"])
        form = schemas["DatasetForm"]
        file = {"file": {"type": "string", "format": "binary", "description": "CSV or TSV."}}
        spec = {"spec": {"type": "string", "description": "A JobSpec, as JSON text.", "default": "{}"}}
        upload = {"type": "object", "required": ["file"], "additionalProperties": False}
        schemas["DatasetUpload"] = upload | {"properties": file | form["properties"]}
        schemas["JobUpload"] = upload | {"properties": file | spec | form["properties"]}
    return document
