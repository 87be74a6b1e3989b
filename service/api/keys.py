"""Keys: made, listed and revoked by whoever holds an admin key."""

import base64
import hmac
from datetime import timedelta
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import select

from service.api.context import Context, Ctx, Limit, after, json_body, takes
from service.api.idempotency import IdempotencyKey, answer_once, json_content, respond
from service.api.schemas import KeyIn, KeyOut, NewKeyOut, Page
from service.core.errors import Conflict
from service.db import catalog
from service.db.idempotency import Answer, Claim, keep
from service.db.models import ApiKey

router = APIRouter(tags=["keys"])


@router.get("/keys", response_model=Page[KeyOut])
def list_keys(ctx: Ctx, limit: Limit = 50, after: after("key") = None) -> Page[KeyOut]:  # type: ignore[valid-type]
    """Every key ever made, without its secret."""
    with ctx.db.read() as session:
        rows, more = catalog.newest(session, ApiKey, limit, after)
    return Page(data=[KeyOut.model_validate(row) for row in rows], has_more=more)


@router.post("/keys", status_code=201, response_model=NewKeyOut, openapi_extra=takes(json="KeyIn"))
async def create_key(
    request: Request, ctx: Ctx, body: Annotated[KeyIn, Depends(json_body(KeyIn, 1 << 16))], key: IdempotencyKey = None
) -> Response:
    """Make a key. Its secret, `key`, is shown in this answer alone."""
    answer = await answer_once(request, ctx, key, lambda: json_content(body), partial(_create, ctx, body, key))
    return respond(answer, key=_secret(key, answer.token))


@router.delete("/keys/{key_id}", status_code=204)
def revoke_key(ctx: Ctx, key_id: str) -> Response:
    """Revoke a key, and with it every session that was signed in with it."""
    now = ctx.clock()
    with ctx.db.write() as session:
        asked = select(ApiKey).where(ApiKey.scope == "admin", ApiKey.revoked_at.is_(None)).with_for_update()
        if [admin.id for admin in session.scalars(asked) if catalog.is_live(admin, now)] == [key_id]:
            raise Conflict(
                "This is the last admin key: without it nobody could manage keys over HTTP. Make another one first, or "
                f"revoke it on the service's machine with `tuneproof keys revoke {key_id}`."
            )
        catalog.revoke_key(session, key_id, now)
    return Response(status_code=204)


def _create(ctx: Context, body: KeyIn, idempotency_key: str | None, claim: Claim) -> Answer:
    if body.scope != "admin" and not ctx.keys_exist():
        raise Conflict(
            "The first key must be of scope 'admin': from then on every call needs a key, and none could make others."
        )
    now = ctx.clock()
    expires_at = None if body.expires_days is None else now + timedelta(days=body.expires_days)
    with ctx.db.write() as session:
        secret = _secret(idempotency_key, claim.token)
        key, _ = catalog.create_key(session, body.name, body.scope, now, expires_at, secret)
        return keep(session, claim, 201, KeyOut.model_validate(key).model_dump(mode="json"), None)


def _secret(idempotency_key: str | None, token: str) -> str:
    """The secret of a key, from the random token it was made under and the Idempotency-Key it was asked for with.

    So the answer can be given again although the secret is nowhere kept: the database has the token, and of the
    Idempotency-Key only a hash, for 24 h. Who reads the database and guesses the Idempotency-Key has both, so it is to
    be random. Without one, the token is not kept either.
    """
    digest = hmac.digest((idempotency_key or "").encode(), token.encode(), "sha256")
    return f"tp_{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"
