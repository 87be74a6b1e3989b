"""Serves the pages under `/ui/`: files as they lie here, no build step, nothing from another host."""

from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_HEADERS = {
    # Texts and labels of strangers are shown: only our own files run, and no page of another site may frame these.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    # Asked again each time by ETag, so that after an upgrade no page runs old scripts against a new API.
    "Cache-Control": "no-cache",
}


class Pages(StaticFiles):
    """The folder `static/`, each answer with the headers above."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parent / "static", html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response
