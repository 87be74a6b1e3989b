"""`Idempotency-Key`: a request that creates something and is sent twice creates it once.

Answers that created something are kept, and no others. An error has created nothing, so asking again can do no harm and
may do better: the disk has room again, the dataset is there, the operator allows more labels.
Source: draft-ietf-httpapi-idempotency-key-header; Stripe, "Idempotent requests", which keeps no refusals either.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, BinaryIO

from fastapi import Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from service.api.context import Caller, Context
from service.core.errors import StillAnswering
from service.db import idempotency
from service.db.idempotency import Answer, AnsweredElsewhere, Claim

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[!-~]([ -~]*[!-~])?$",
        description="Sent again within 24 h with the same request, it gives the first answer again.",
    ),
]  # fmt: skip
_SECONDS_BETWEEN_LOOKS = 0.1
_LONGEST_WAIT_SECONDS = 90.0


async def answer_once(
    request: Request, ctx: Context, key: str | None, content: Callable[[], str], make: Callable[[Claim], Answer]
) -> Answer:
    """What `make` answers, or what it answered when the caller sent this request before.

    `make` creates, and calls `idempotency.keep` in the transaction that does; it may be called more than once.
    `content` says in one string what the body asks for. Without a key, `make` is just called.

    Raises:
        IdempotencyKeyReused: the key came with another request before.
        StillAnswering: the first request is being answered for longer than anybody should wait.
    """
    if key is None:
        return await run_in_threadpool(make, idempotency.unkeyed())
    caller: Caller = request.state.caller
    name = "loopback" if caller.key is None else caller.key.id
    asked = f"{request.method} {request.scope['path']}\n{await run_in_threadpool(content)}"
    request_sha256 = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LONGEST_WAIT_SECONDS
    while True:
        found = await run_in_threadpool(idempotency.claim, ctx.db, name, key, request_sha256, ctx.clock())
        if isinstance(found, Answer):
            return found
        if isinstance(found, Claim):
            try:
                return await run_in_threadpool(make, found)
            except AnsweredElsewhere:
                continue
            except Exception:
                await run_in_threadpool(idempotency.give_back, ctx.db, found)
                raise
        if loop.time() > deadline or await request.is_disconnected() or await ctx.pause(_SECONDS_BETWEEN_LOOKS):
            raise StillAnswering(
                "Another request with this Idempotency-Key is still being answered. Send it again in a moment."
            )


def respond(answer: Answer, **more: Any) -> JSONResponse:
    """The answer as it goes out; `more` are fields that are never kept."""
    headers = {"Location": answer.location} if answer.location is not None else {}
    if answer.replayed:
        headers["Idempotency-Replayed"] = "true"
    return JSONResponse(answer.body | more, answer.status, headers)


def json_content(body: BaseModel) -> str:
    """By its parsed value: spaces, the order of keys and how a number is written do not make another request."""
    return json.dumps(body.model_dump(mode="json", exclude_unset=True), sort_keys=True)


def form_content(fields: Mapping[str, str], file: BinaryIO) -> str:
    """By the file's bytes and the other fields; not by the file's name or the boundary."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # a spooled file can do all that is asked
    return json.dumps({"file": digest.hexdigest(), "fields": fields}, sort_keys=True)
