"""The only wiring: settings in, application out."""

import asyncio
import contextlib
import itertools
import logging
import shutil
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool

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
from service.api.envelope import Envelope
from service.api.meters import Meters
from service.api.predict import served_model
from service.api.schemas import AliasIn, DatasetForm, KeyIn, PredictIn, Problem, SessionIn
from service.core import logs
from service.core.clock import Clock, utc_now
from service.core.errors import StorageUnavailable
from service.core.settings import Settings
from service.core.spec import JobSpec
from service.db import catalog, garbage, idempotency, sessions
from service.db import jobs as job_queue
from service.db.engine import Database, is_away, migrate, take_turns
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
_SECONDS_BETWEEN_ROUNDS, _ROUNDS_BETWEEN_FORGETTING = 5.0, 12
_BEFORE_TRYING_AGAIN, _SPOOLED = timedelta(minutes=1), timedelta(days=1)
_WARM_MODELS = 20
log = logging.getLogger("tuneproof.api")


def create_app(settings: Settings | None = None, clock: Clock = utc_now) -> FastAPI:
    """The application. Its lifespan migrates the database and runs the engine process and the housekeeping."""
    settings = settings or Settings()
    (settings.data_dir / "tmp").mkdir(parents=True, exist_ok=True)
    db = Database(settings.resolved_database_url, settings.database_connections)
    storage = Storage(settings.resolved_storage_url)
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
    webhooks = Webhooks(context.db, context.settings, context.clock)
    rooms = (context.engine.run(lambda: _models_to_warm(context)), _housekeeping(context), webhooks.run())
    tasks = [asyncio.create_task(room) for room in rooms]
    for task in tasks:
        task.add_done_callback(_tell_if_it_died)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await context.engine.stop()
    context.db.close()


def _tell_if_it_died(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        how = "broke as it was stopped" if task.cancelling() else "ended and will not come back: restart the API"
        log.critical("%s %s\n%s", task.get_coro(), how, logs.where(error))


def _bootstrap(context: Context) -> None:
    """Stores the first key that a container was given, where there is none."""
    secret = context.settings.bootstrap_secret
    if secret and not context.keys_exist():
        with context.db.write() as session:
            take_turns(session, "the first key")
            if catalog.list_keys(session):
                return
            catalog.create_key(session, "bootstrap", "admin", context.clock(), secret=secret)


def _models_to_warm(context: Context) -> list[ServedModel]:
    """What is loaded before the first call asks for it.

    The bases of the aliases' models, without aliases those of the newest models, without models the embedded one; and
    the models that TUNEPROOF_PRELOAD names, as they are now.
    """
    with context.db.read() as session:
        preloaded, unknown = catalog.named_models(session, context.settings.preloaded)
        served = catalog.models_with_alias(session) or catalog.newest(session, Model, _WARM_MODELS, None)[0]
    for name in unknown:
        log.warning("TUNEPROOF_PRELOAD: no model has the id or alias %r", name)
    bases = dict.fromkeys((model.base_model, model.base_revision) for model in served)
    if not bases:
        bases = {(EMBEDDED, find_base(EMBEDDED, None).revision): None}
    return [ServedModel("", name, revision, "", ()) for name, revision in bases] + [*map(served_model, preloaded)]


async def _housekeeping(context: Context) -> None:
    """Takes jobs from lost workers, deletes bytes whose grace time is over, and forgets old sessions and answers."""
    for number in itertools.count():
        try:
            await run_in_threadpool(_round, context, number % _ROUNDS_BETWEEN_FORGETTING == 0)
        except Exception as error:  # noqa: BLE001 -- it is to go on, and the log says where
            if is_away(error):  # nor could those at work renew
                context.steady.doubt()
            logs.failed(log, "housekeeping failed; it is tried again", error, away=is_away(error))
        await asyncio.sleep(_SECONDS_BETWEEN_ROUNDS)


def _round(context: Context, forgets: bool = True) -> None:
    now, settings = context.clock(), context.settings
    grace = timedelta(seconds=settings.delete_grace_seconds)
    if not context.steady():  # those at work have had no time to renew by a clock that was set, and it may be set back
        garbage.due(context.db, now)  # asked all the same: what is away is to be noticed for as long as it is
        return
    job_queue.reap(context.db, now, settings.max_attempts, grace)
    if forgets:  # they need the database's write lock each time, and what is over is refused without
        sessions.forget_ended(context.db, now)
        idempotency.forget_old(context.db, now)
        _forget_spooled(settings.data_dir / "tmp", now - _SPOOLED)
        if settings.retention_days:
            catalog.remove_old_datasets(context.db, now - timedelta(days=settings.retention_days), now, grace)
    for garbage_id, prefix in garbage.due(context.db, now):
        try:
            context.storage.delete(prefix)
        except StorageUnavailable as error:  # each more would wait as long
            log.warning("%s", error)
            return
        except OSError as error:
            log.warning("%s cannot be deleted yet (%s)", prefix, type(error).__name__)
            garbage.postpone(context.db, garbage_id, now + _BEFORE_TRYING_AGAIN)
        else:
            garbage.collected(context.db, garbage_id)


def _forget_spooled(folder: Path, before: datetime) -> None:
    """Deletes what a killed process was reading: copies of uploads, and of models."""
    for left in folder.iterdir():
        with contextlib.suppress(OSError):
            if left.lstat().st_mtime < before.timestamp():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


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
