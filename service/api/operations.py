"""For whoever runs the service: is it up, is it ready, how is it doing."""

import asyncio
import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from service.api.context import Context, Ctx, caller_of
from service.api.meters import WORKER_SILENT, Meters
from service.api.schemas import HealthOut, ReadyOut
from service.core.errors import LowDisk, Unauthorized
from service.db import catalog
from service.db.engine import revisions
from service.inference.handle import EngineHandle

_UNKNOWN = "not known without the database"
_PROBE_SECONDS = 4.0  # whoever asks `/readyz` gives up after some five
_SILENT = f"has not answered for {_PROBE_SECONDS:g} s."
Found = TypeVar("Found")
router = APIRouter(tags=["operations"])
log = logging.getLogger("tuneproof.api")


@router.get("/", include_in_schema=False)
async def home() -> RedirectResponse:
    return RedirectResponse("ui/")


@router.get("/healthz", response_model=HealthOut)
async def healthz() -> HealthOut:
    """The process is up."""
    return HealthOut(status="ok")


@router.get("/readyz", response_model=ReadyOut, response_model_exclude_none=True, responses={503: {"model": ReadyOut}})
async def readyz(request: Request, response: Response, ctx: Ctx) -> ReadyOut:
    """Whether it can do its work; with a key, in words."""
    ready, checks = await _checks(ctx)
    if not ready:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    try:
        if checks["database"].startswith(_SILENT):
            raise TimeoutError  # nor would it say whose key this is
        await run_in_threadpool(caller_of, request, ctx)
    except Unauthorized:
        checks = {}
    except (SQLAlchemyError, TimeoutError) as error:  # whose key it is cannot be looked up: the log is told instead
        log.error("not ready: the database cannot be read (%s)", type(error).__name__)
        checks = {}
    return ReadyOut(status="ready" if ready else "not_ready", checks=checks or None)


@router.get("/metrics", response_class=Response)
def metrics(request: Request, ctx: Ctx) -> Response:
    """Prometheus."""
    meters: Meters = request.app.state.meters
    with ctx.db.read() as session:
        return Response(meters.exposition(session, ctx.engine, ctx.clock()), media_type=CONTENT_TYPE_LATEST)


async def _checks(ctx: Context) -> tuple[bool, dict[str, Any]]:
    """Whether it can do its work, and each part in words: `ok`, or what is wrong and what to do."""
    unread: tuple[str, list[str], list[str] | str] = f"{_SILENT} See TUNEPROOF_DATABASE_URL.", [], _UNKNOWN
    storage, (database, unknown, workers) = await asyncio.gather(
        _looked(ctx, _storage, f"{_SILENT} See TUNEPROOF_STORAGE_URL."), _looked(ctx, _database, unread)
    )
    engine = _engine(ctx.engine, unknown)
    ready = database == storage == "ok" and ctx.engine.warm
    return ready, {
        "database": database, "storage": storage, "engine": engine, "workers": workers, "disk": _disk(ctx),
        "versions": {"tuneproof": version("tuneproof")},
    }  # fmt: skip


def _database(ctx: Context) -> tuple[str, list[str], list[str] | str]:
    """In words, the names in TUNEPROOF_PRELOAD that it does not know, and the workers that it has seen lately."""
    try:
        with ctx.db.read() as session:
            has, needs = revisions(session.connection())
            _models, unknown = catalog.named_models(session, ctx.settings.preloaded)
            seen = catalog.workers_seen(session, ctx.clock() - WORKER_SILENT)
    except Exception as error:  # noqa: BLE001 -- whatever the driver raises, it is not ready
        todo = "Is it running, and does its disk have space? `tuneproof doctor` looks closer."
        return f"cannot be read ({type(error).__name__}). {todo}", [], _UNKNOWN
    words = "ok" if has == needs else (
        f"is at revision {has}, and this version works with {needs}. Run `tuneproof migrate`, or, where a newer "
        "tuneproof wrote it, install that one."
    )  # fmt: skip
    return words, unknown, seen or "none seen for 30 s, so no job is taken: start one with `tuneproof worker`"


async def _looked(ctx: Context, look: Callable[[Context], Found], silent: Found) -> Found:
    """One look at a time, however many ask and hang up: where nothing answers, each would hold a thread."""
    looking = ctx.looking.get(look)
    if looking is None or looking.done():
        looking = ctx.looking[look] = asyncio.create_task(asyncio.to_thread(look, ctx))
    done, _waiting = await asyncio.wait((looking,), timeout=_PROBE_SECONDS)
    return looking.result() if done else silent


def _storage(ctx: Context) -> str:
    try:
        ctx.storage.probe()
    except Exception as error:  # noqa: BLE001 -- every driver has its own
        todo = "Is it there, and may the service's user read it? See TUNEPROOF_STORAGE_URL."
        return f"cannot be reached ({type(error).__name__}). {todo}"
    return "ok"


def _engine(engine: EngineHandle, unknown: list[str]) -> str:
    figures = engine.figures
    words = [f"cannot preload {name!r}: no model has that id or alias (TUNEPROOF_PRELOAD)" for name in unknown]
    if not engine.running or figures is None:
        words.append("is starting: /predict answers 503 until it is there")
    else:
        words += [f"is loading base model '{name}': until then its models answer 503" for name in figures.loading]
        words += figures.refused.values()
        if figures.away:
            words.append(figures.away)
        elif not (engine.warm or figures.loading):
            words.append("is loading the models that TUNEPROOF_PRELOAD names")
    if engine.restarts:
        words.append(f"was lost and started again, so far {engine.restarts} times; the log says why")
    return "; ".join(words) or "ok"


def _disk(ctx: Context) -> str:
    try:
        ctx.refuse_on_low_disk()
    except LowDisk as error:
        return f"uploads and jobs are refused with 507. {error.detail}"
    return "ok"
