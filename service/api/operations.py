"""For whoever runs the service: is it up, is it ready, how is it doing."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

from service.api.context import Context, Ctx, scope_of_caller
from service.api.meters import WORKER_SILENT, Meters
from service.api.schemas import HealthOut, ReadyOut
from service.core.errors import Unauthorized
from service.db import catalog

router = APIRouter(tags=["operations"])


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
    checks = await run_in_threadpool(_checks, ctx)
    ready = all(checks[name] == "ok" for name in ("database", "storage", "engine"))
    if not ready:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    try:
        await run_in_threadpool(scope_of_caller, request, ctx)
    except Unauthorized:
        checks = {}
    return ReadyOut(status="ready" if ready else "not_ready", checks=checks or None)


@router.get("/metrics", response_class=Response)
def metrics(request: Request, ctx: Ctx) -> Response:
    """Prometheus."""
    meters: Meters = request.app.state.meters
    with ctx.db.read() as session:
        return Response(meters.exposition(session, ctx.engine, ctx.clock()), media_type=CONTENT_TYPE_LATEST)


def _checks(ctx: Context) -> dict[str, Any]:
    checks: dict[str, Any] = {"database": "ok", "storage": "ok", "engine": "ok", "workers": []}
    try:
        with ctx.db.read() as session:
            session.execute(text("SELECT 1"))
            checks["workers"] = [
                row["id"] for row in catalog.workers_seen(session, ctx.clock() - WORKER_SILENT)
            ] or "none seen for 30 s: start one with `tuneproof worker`"
    except Exception as error:  # noqa: BLE001 -- whatever the driver raises, it is not ready
        checks["database"] = f"cannot be read ({type(error).__name__})"
    try:
        ctx.storage.probe()
    except Exception as error:  # noqa: BLE001
        checks["storage"] = f"cannot be reached ({type(error).__name__})"
    if not ctx.engine.running:
        checks["engine"] = "is starting"
    checks["versions"] = {"tuneproof": version("tuneproof")}
    return checks
