"""Aliases: which model stands behind a name, and the gate a model passes before it takes another's place."""

import contextlib
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import AfterValidator
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError
from starlette.concurrency import run_in_threadpool

from service.api import gate
from service.api.context import Context, Ctx, json_body, takes
from service.api.schemas import (
    AliasIn,
    AliasMovedOut,
    AliasMoveOut,
    AliasWithHistoryOut,
    GateOut,
    GateSkippedOut,
    Page,
)
from service.core.errors import Conflict, PromotionRefused
from service.db import catalog
from service.db.models import Model

router = APIRouter(tags=["models"])
ATTEMPTS = 3


def _no_model_id(alias: str) -> str:
    if alias.startswith("mdl_"):
        raise ValueError("an alias must not look like a model's id (mdl_…)")
    return alias


AliasName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$"), AfterValidator(_no_model_id)]


@router.get("/aliases", response_model=Page[AliasWithHistoryOut])
def list_aliases(ctx: Ctx) -> Page[AliasWithHistoryOut]:
    """Every alias with where it pointed before, newest first."""
    with ctx.db.read() as session:
        data = [AliasWithHistoryOut.model_validate(alias) for alias in catalog.list_aliases(session)]
    return Page(data=data, has_more=False)


@router.get("/aliases/{alias}/history", response_model=Page[AliasMoveOut])
def get_alias_history(ctx: Ctx, alias: AliasName) -> Page[AliasMoveOut]:
    """Where one alias has pointed, newest first; also once it is deleted."""
    with ctx.db.read() as session:
        data = [AliasMoveOut.model_validate(move) for move in catalog.moves_of(session, alias)]
    return Page(data=data, has_more=False)


@router.get("/aliases/{alias}/gate", response_model=GateOut | GateSkippedOut | None)
async def look_at_gate(
    request: Request,
    ctx: Ctx,
    alias: AliasName,
    model_id: Annotated[str, Query(max_length=64, description="The candidate.")],
) -> GateOut | GateSkippedOut | None:
    """What the gate would say if the alias were pointed to that model now; nothing is moved."""
    candidate, incumbent = await run_in_threadpool(_sides, ctx, alias, model_id)
    return await _gate(ctx, candidate, incumbent, request.is_disconnected)


@router.put("/aliases/{alias}", response_model=AliasMovedOut, openapi_extra=takes(json="AliasIn"))
async def put_alias(
    request: Request, ctx: Ctx, alias: AliasName, body: Annotated[AliasIn, Depends(json_body(AliasIn, 1 << 16))]
) -> AliasMovedOut:
    """Point an alias to a model; every later call of `/predict` sees the new one.

    A model that is shown to be worse than the one the alias points to is refused, unless `force` is set.
    """
    for _ in range(ATTEMPTS):
        candidate, incumbent = await run_in_threadpool(_sides, ctx, alias, body.model_id)
        found = await _gate(ctx, candidate, incumbent, request.is_disconnected, force=body.force)
        if isinstance(found, GateOut) and found.verdict == "incumbent_wins" and incumbent is not None:
            raise PromotionRefused(gate.refusal(found, alias, candidate.id, incumbent.id))
        if await request.is_disconnected():
            raise Conflict("The caller left before the alias was moved; it stays.")
        moved = await run_in_threadpool(_move, ctx, alias, candidate, incumbent, body.force)
        if moved is not None:
            return moved.model_copy(update={"gate": found})
    raise Conflict(f"The alias {alias!r} was moved by others while the model was checked. Look at it, then ask again.")


@router.delete("/aliases/{alias}", status_code=204)
def delete_alias(ctx: Ctx, alias: AliasName) -> Response:
    """The name stands for no model any more; its history stays."""
    with ctx.db.write() as session:
        catalog.remove_alias(session, alias)
    return Response(status_code=204)


def _sides(ctx: Context, alias: str, model_id: str) -> tuple[Model, Model | None]:
    """Candidate and incumbent. Raises NotFound."""
    with ctx.db.read() as session:
        candidate, incumbent_id = catalog.get_model(session, model_id), catalog.pointed_to(session, alias)
        return candidate, None if incumbent_id is None else catalog.get_model(session, incumbent_id)


async def _gate(
    ctx: Context, candidate: Model, incumbent: Model | None, gone: gate.Gone, *, force: bool = False
) -> GateOut | GateSkippedOut | None:
    if incumbent is None or incumbent.id == candidate.id:
        return None
    if force:
        return GateSkippedOut(note=f"Forced: {candidate.id} was not compared with {incumbent.id}, which it replaces.")
    return await gate.check(ctx, candidate, incumbent, gone)


def _move(ctx: Context, alias: str, candidate: Model, incumbent: Model | None, force: bool) -> AliasMovedOut | None:
    """Moves the alias; None where it no longer points to the model that the candidate was checked against."""
    # Suppressed is what is raised where another one made or deleted the alias in this moment.
    with contextlib.suppress(IntegrityError, StaleDataError), ctx.db.write() as session:
        if force or catalog.pointed_to(session, alias, lock=True) == (incumbent.id if incumbent else None):
            row = catalog.point_alias(session, alias, candidate.id, ctx.clock())
            return AliasMovedOut(alias=row.alias, model_id=row.model_id, updated_at=row.updated_at, gate=None)
    return None
