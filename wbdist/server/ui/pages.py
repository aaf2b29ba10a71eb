"""The page and its static files. They hold no data, so they need no login; what they show comes from /api/ui, which does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).with_name("static")
SECURITY_HEADERS = {
    # Nothing from elsewhere, nothing inline, no frame around us, no form to elsewhere.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_RESERVED = frozenset({"api", "files", "graphql", "healthz", "login", "sdk", "static"})
"""First path segments that are no entities: an unknown path below them is a 404, not a page."""
_NOT_BUILT = (
    "The web pages were left out of this installation. Build them with `python hatch_build.py` in a checkout, or reinstall.\n"
)


def routes() -> list[BaseRoute]:
    """GET / and the addresses that W&B's client prints; GET /static/...; no login."""

    async def page(request: Request) -> Response:
        if request.path_params.get("entity") in _RESERVED:
            return PlainTextResponse("Not Found", 404)
        index = STATIC / "index.html"
        if not index.is_file():
            return PlainTextResponse(_NOT_BUILT, 503)
        # Its scripts have new names in every version, so an old page would ask for files that are gone.
        return FileResponse(index, headers={**SECURITY_HEADERS, "Cache-Control": "no-cache"})

    paths = ("/", "/{entity}/{project}", "/{entity}/{project}/runs/{run}", "/{entity}/{project}/groups/{group:path}")
    static = Mount("/static", _Static(directory=STATIC, check_dir=False), middleware=[Middleware(GZipMiddleware)])
    return [static, *(Route(path, page, methods=["GET"]) for path in paths)]


class _Static(StaticFiles):
    def file_response(self, full_path: Any, stat_result: os.stat_result, scope: Scope, status_code: int = 200) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(SECURITY_HEADERS)
        # Names hold a digest of the content, so a file never changes under its name.
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response
