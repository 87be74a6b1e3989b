"""What every error answer must look like."""

import re
from collections.abc import Iterator
from typing import Any

from service.core.errors import AppError

_TELLTALE = re.compile(r'Traceback|site-packages|\.py\b|File "|/tmp/|/home/|/work/|sqlalchemy|pydantic', re.IGNORECASE)


def problem_of(response: Any, status: int, code: str) -> dict[str, Any]:
    """The answer as a problem of that status and code, its shape checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body.keys() - {"columns"} == {"type", "title", "status", "detail", "code", "errors", "request_id"}
    assert (body["status"], body["code"]) == (status, code)
    assert body["type"].endswith(code)
    assert body["title"]
    assert len(body["detail"]) > 15
    assert body["request_id"] == response.headers["x-request-id"] != ""
    for entry in body["errors"]:
        assert set(entry) in ({"loc", "message"}, {"row", "message"})
    assert not _TELLTALE.search(response.text), response.text
    if status in (429, 503):
        assert int(response.headers["retry-after"]) > 0
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
    return body


def every_error(kind: type[AppError] = AppError) -> Iterator[type[AppError]]:
    for error in kind.__subclasses__():
        yield error
        yield from every_error(error)
