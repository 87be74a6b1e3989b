"""Signing in: a cookie that counts as a key, for pages, which cannot send a header with every link and stream."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from service.api.context import SESSION_COOKIE, Ctx, caller_of, json_body, refuse_other_sites, takes
from service.api.schemas import SessionIn, SessionKeyOut, SessionOut
from service.core.errors import Unauthorized
from service.db import catalog, sessions

router = APIRouter(tags=["session"])


@router.get("/session", response_model=SessionOut)
def get_session(request: Request, ctx: Ctx) -> SessionOut:
    """Who the caller is to the service; 401 where it would let nobody in."""
    caller = caller_of(request, ctx)
    key = None if caller.key is None else SessionKeyOut(id=caller.key.id, name=caller.key.name)
    return SessionOut(scope=caller.scope, key=key, keys_exist=ctx.keys_exist())


@router.post("/session", status_code=204, openapi_extra=takes(json="SessionIn"))
def open_session(
    request: Request, ctx: Ctx, body: Annotated[SessionIn, Depends(json_body(SessionIn, 1 << 16))]
) -> Response:
    """Signs in with a key: sets a cookie that counts as the key for seven days."""
    refuse_other_sites(request)  # else a stranger could sign somebody in with a key of his own
    with ctx.db.write() as session:
        key = catalog.find_key(session, body.key.get_secret_value().strip(), ctx.clock())
        if key is None:
            raise Unauthorized("The key is unknown, revoked or expired. Make one with `tuneproof keys create`.")
        if before := request.cookies.get(SESSION_COOKIE):
            sessions.end_session(session, before)
        token = sessions.open_session(session, key, ctx.clock())
    response = Response(status_code=204)
    response.set_cookie(
        SESSION_COOKIE, token, max_age=int(sessions.LASTS.total_seconds()), httponly=True, samesite="strict",
        # Behind a proxy that this process does not trust the scheme is http; the browser knows better.
        secure=request.scope["scheme"] == "https" or request.headers.get("origin", "").startswith("https://"),
    )  # fmt: skip
    return response


@router.delete("/session", status_code=204)
def end_session(request: Request, ctx: Ctx) -> Response:
    """Signs out: the cookie is dropped, and the session behind it."""
    refuse_other_sites(request)
    if token := request.cookies.get(SESSION_COOKIE):
        with ctx.db.write() as session:
            sessions.end_session(session, token)
    response = Response(status_code=204)
    response.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
    return response
