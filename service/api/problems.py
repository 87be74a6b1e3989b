"""Every error as RFC 9457 problem+json, and which status each kind of error has."""

import difflib
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException

from service.core import errors
from service.core.errors import AppError, InvalidInput
from service.db.engine import is_away

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2

STATUS: dict[type[AppError], int] = {
    errors.InvalidInput: 422,
    errors.UnsupportedMedia: 415,
    errors.TooSlow: 408,
    errors.TooLarge: 413,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.LeaseLost: 409,
    errors.QueueFull: 429,
    errors.RateLimited: 429,
    errors.TooManyStreams: 503,
    errors.Busy: 503,
    errors.StorageUnavailable: 503,
    errors.StillAnswering: 503,
    errors.EngineUnavailable: 503,
    errors.BaseLoading: 503,
    errors.BaseNotServed: 503,
    errors.ModelUnavailable: 503,
    errors.EndpointUnavailable: 503,
    errors.OutOfMemory: 503,
    errors.RoundTripFailed: 500,
    errors.ModelDamaged: 500,
    errors.EngineFailed: 500,
    errors.DeadlinePassed: 504,
    errors.LowDisk: 507,
}
"""An error that does not stand here has the status of the kind that it is one of."""
_SLUGS = {
    400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type",
    416: "range_not_satisfiable", 500: "internal",
}  # fmt: skip


def status_of(error: type[AppError]) -> int:
    return next(STATUS[kind] for kind in error.__mro__ if kind in STATUS)


def problem(
    request: Request, status: int, code: str, detail: str, entries: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None,
) -> Response:  # fmt: skip
    """One error answer, with the header that says what to do next where one does. `more` are extension members."""
    headers = dict(headers or {})
    if status in (429, 503, 507):
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {
        "type": f"urn:tuneproof:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "errors": list(entries),
        "request_id": request.scope.get("state", {}).get("request_id", ""),
        **(more or {}),
    }
    # A lone surrogate cannot be written as UTF-8; it must not turn an error into a crash.
    written = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(written, status, headers, MEDIA_TYPE)


def crashed(request: Request, error: Exception) -> Response:
    """What broke on our side: 507 where a disk is full, 503 where the database is locked for long, else 500."""
    if errors.disk_is_full(error):
        detail = "The service's disk is full; nothing of this call was kept. Delete something, or give it more."
        return problem(request, 507, errors.LowDisk.code, detail)
    cause = getattr(error, "orig", None)
    locked = getattr(cause, "sqlite_errorname", "").startswith("SQLITE_BUSY") or (
        getattr(cause, "sqlstate", None) in ("40P01", "55P03")  # PostgreSQL's deadlock, and a lock waited for too long
    )
    if is_away(error) and not locked:
        detail = "The service's database did not answer; nothing of this call was kept. Ask again in a moment."
        return problem(request, 503, errors.Busy.code, detail)
    if locked or isinstance(error, NoConnection):
        detail = "The database was being written to all the time that this call waited for it. Ask again in a moment."
        return problem(request, 503, errors.Busy.code, detail)
    return problem(request, 500, "internal", "Something broke on our side; the log names it by this request's id.")


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem."""

    @app.exception_handler(AppError)
    async def app_error(request: Request, error: AppError) -> Response:
        detail = f"{error.detail} {error.hint}" if error.hint else error.detail
        more = {"columns": error.columns} if isinstance(error, errors.InvalidData) and error.columns else {}
        wait = error.retry_after_seconds
        headers = {} if wait is None else {"Retry-After": str(wait)}
        return problem(request, status_of(type(error)), error.code, detail, error.errors, headers, more)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        found = invalid(error.errors())
        return problem(request, 422, found.code, found.detail, found.errors)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        status, detail = error.status_code, str(error.detail)
        if status == 404:
            detail = "Nothing is at this path. The routes are listed at /docs."
        elif status == 405:
            detail = f"{request.method} is not offered at this path. The routes are listed at /docs."
        elif status == 413:
            detail = "The body is larger than this service takes; see TUNEPROOF_MAX_UPLOAD_BYTES."
        elif status == 400:  # what Starlette says of a multipart body it cannot read
            return problem(request, 422, InvalidInput.code, f"The body cannot be read: {detail}")
        return problem(request, status, _SLUGS.get(status, "error"), detail, headers=error.headers)


def invalid(found: Sequence[Any], model: type[BaseModel] | None = None) -> InvalidInput:
    """Pydantic's findings as one error, an entry per field. What was sent is not repeated: it may be a text."""
    schema = None if model is None else model.model_json_schema()
    entries: dict[tuple[int | str, ...], str] = {}
    for item in found:
        # A union's branches are named in the location; they mean nothing to a caller.
        loc = tuple(part for part in item["loc"] if not (isinstance(part, str) and _names_a_branch(part)))
        allowed = "" if schema is None or item["type"] == "missing" else _allowed(schema, loc)
        message = f"expected {allowed}" if allowed else item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such field" + _meant(schema, loc)
        entries.setdefault(
            tuple(part[:100] if isinstance(part, str) else part for part in loc if part != _KEY), message
        )
    fields = sorted({".".join(str(part) for part in loc) for loc in entries if loc})
    where = f" in {', '.join(fields[:5])}" if fields else ""
    first = next(iter(entries.values()), "the request does not fit the schema")
    first += "" if first.endswith("?") else "."
    return InvalidInput(
        f"The request is not valid{where}: {first} See `errors`, and /docs for what is expected.",
        errors=[{"loc": list(loc), "message": message} for loc, message in entries.items()],
    )


def from_pydantic(error: ValidationError, model: type[BaseModel] | None = None) -> InvalidInput:
    return invalid(error.errors(include_input=False, include_url=False, include_context=False), model)


_KEY = "[key]"  # how Pydantic says that the key is at fault, not the value


def _allowed(schema: dict[str, Any], loc: Sequence[int | str]) -> str:
    """What a field may hold, by the model's JSON schema: `1 to 100, or 'auto'`; empty where that cannot be said."""
    node = schema
    at_key = loc[-1:] == (_KEY,)
    for part in loc[:-2] if at_key else loc:
        node = _resolved(schema, node)
        inside = node.get("properties", {}).get(part) or node.get("items") or node.get("additionalProperties")
        if not isinstance(inside, dict):
            return ""
        node = inside
    node = _resolved(schema, node)
    node = node.get("propertyNames", {}) if at_key else node
    return ", or ".join(filter(None, (_values(_resolved(schema, branch)) for branch in node.get("anyOf", [node]))))


def _meant(schema: dict[str, Any] | None, loc: Sequence[int | str]) -> str:
    """The fields that there are beside an unknown one, or the one that it resembles."""
    node = _resolved(schema, schema) if schema else {}
    for part in loc[:-1]:
        node = _resolved(schema or {}, node.get("properties", {}).get(part, {}))
    known = sorted(node.get("properties", {}))
    close = difflib.get_close_matches(str(loc[-1])[:100], known, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(known)}" if known else ""


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    name = node.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][name] if name else node


def _values(node: dict[str, Any]) -> str:
    if "const" in node or "enum" in node:
        return ", ".join(repr(value) for value in node.get("enum", [node.get("const")]))
    for least, most, unit in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minProperties", "maxProperties", " pairs"),
    ):
        low, high = node.get(least), node.get(most)
        if high is not None:
            return (f"at most {high}" if low is None else f"{low} to {high}") + unit
        if low is not None:
            return f"at least {low}{unit}"
    return "true, or false" if node.get("type") == "boolean" else ""


def _names_a_branch(part: str) -> bool:
    return part in {"int", "float", "bool", "str"} or part.startswith(("literal[", "constrained-", "function-"))
