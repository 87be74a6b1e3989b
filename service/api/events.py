"""What happens to a job: a list to page through, or a stream that goes on until the job has ended."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from service.api.context import Context, Ctx, Limit, caller_of
from service.api.schemas import EventOut, Page
from service.core.errors import NotFound, Unauthorized
from service.db import jobs
from service.db.engine import existing
from service.db.models import Event, Job

router = APIRouter(tags=["jobs"])
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_PINGS = 15.0
_EVENTS_A_LOOK = 200
_WEIGHT = re.compile(r"\s*q=([01](?:\.[0-9]{0,3})?)\s*", re.IGNORECASE)
_NUMBER = {"ge": 0, "le": 2**63 - 1}


class _State(NamedTuple):
    """What only the job's row tells: there is no event for each step of its progress."""

    status: str
    stage: str | None
    fraction: float
    eta_seconds: float | None
    attempt: int
    message: str


@router.get("/jobs/{job_id}/events", response_model=Page[EventOut], responses={
    200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": "`data` is an EventOut."}}}},
    204: {"description": "As a stream: the job has ended and everything was sent."}})  # fmt: skip
async def list_events(
    request: Request,
    response: Response,
    ctx: Ctx,
    job_id: str,
    limit: Limit = 50,
    after: Annotated[int, Query(**_NUMBER, description="The last id seen.")] = 0,
    last_event_id: Annotated[int | None, Header(**_NUMBER, description="As `after`, and before it; streams.")] = None,
) -> Page[EventOut] | Response:
    """What happened, oldest first. With `Accept: text/event-stream` what happens, until the job has ended."""
    response.headers["Vary"] = "Accept"
    if not _wants_stream(request.headers.get("accept", "")):
        _, events = await run_in_threadpool(_look, ctx, job_id, after, limit + 1)
        return Page(data=events[:limit], has_more=len(events) > limit)
    last = after if last_event_id is None else last_event_id
    state, events = await run_in_threadpool(_look, ctx, job_id, last)
    if state.status in jobs.TERMINAL and not events:
        return Response(status_code=204)  # an EventSource stops asking
    return _Stream(ctx, _told(request, ctx, job_id, last))


class _Stream(EventSourceResponse):
    """One of the streams that the process holds; counted until it ends, however it does."""

    def __init__(self, ctx: Context, content: AsyncIterator[bytes]) -> None:
        # Proxies must pass on each event when it comes.
        super().__init__(content, headers={"Cache-Control": "no-store", "Vary": "Accept", "X-Accel-Buffering": "no"})
        self._place = contextlib.ExitStack()
        self._place.enter_context(ctx.streams.hold())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def _told(request: Request, ctx: Context, job_id: str, last: int) -> AsyncIterator[bytes]:
    """Every event after `last`, and the progress whenever it changes; ends with the job, its caller's key, or us."""
    loop = asyncio.get_running_loop()
    told, pinged = None, loop.time()
    while True:
        try:
            state, events = await run_in_threadpool(_look, ctx, job_id, last)
            if loop.time() - pinged >= _SECONDS_BETWEEN_PINGS:
                await run_in_threadpool(caller_of, request, ctx)
                pinged = loop.time()
                yield KEEPALIVE_COMMENT
        except (NotFound, Unauthorized):
            return
        for event in events:
            last = event.id
            yield _sent(event, str(last))
        if len(events) == _EVENTS_A_LOOK:
            continue
        if state != told:
            told = state
            yield _sent(_progress(ctx, job_id, last, state))
        if state.status in jobs.TERMINAL or await ctx.pause(_SECONDS_BETWEEN_LOOKS):
            return


def _look(ctx: Context, job_id: str, last: int, limit: int = _EVENTS_A_LOOK) -> tuple[_State, list[EventOut]]:
    # The state first: where it says that the job has ended, the events that follow are all there are.
    state = select(
        Job.status, Job.stage, Job.progress_fraction, Job.eta_seconds, Job.attempt, Job.progress_message
    ).where(Job.id == job_id)
    events = select(Event).where(Event.job_id == job_id, Event.id > last).order_by(Event.id).limit(limit)
    with ctx.db.read() as session:
        found = existing(session.execute(state).one_or_none(), jobs.NO_SUCH_JOB)
        rows = session.scalars(events).all()
    return _State(*found), [EventOut.model_validate(row, from_attributes=True) for row in rows]


def _progress(ctx: Context, job_id: str, last: int, state: _State) -> EventOut:
    data: dict[str, Any] = state._asdict()
    return EventOut(
        id=last, job_id=job_id, created_at=ctx.clock(), level="info", type="progress", message=data.pop("message"),
        data=data,
    )  # fmt: skip


def _sent(event: EventOut, number: str | None = None) -> bytes:
    return format_sse_event(data_str=event.model_dump_json(), id=number)


def _wants_stream(accept: str) -> bool:
    """Whether a stream is named, and not after JSON; `*/*` alone is JSON."""
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        kind, *parameters = part.split(";")
        given = [match[1] for match in map(_WEIGHT.fullmatch, parameters) if match]
        weights[kind.strip()] = float(given[0]) if given else 1.0
    return weights.get("text/event-stream", 0.0) > weights.get("application/json", 0.0)
