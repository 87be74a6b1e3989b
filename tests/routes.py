"""Every route of the application, also those that its OpenAPI document does not list."""

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """`(method, path)`; what is mounted below a path is `GET /path/{path}`."""
    found = set()
    for route in iter_route_contexts(app.routes):
        below = isinstance(route.original_route, Mount)
        methods = {"GET"} if below else route.methods
        assert methods, f"{route.path} is of a kind that nobody here knows"
        found |= {(method, f"{route.path}/{{path}}" if below else str(route.path)) for method in methods}
    return found
