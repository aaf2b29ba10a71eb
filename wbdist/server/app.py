"""The app: every route over one context."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from importlib import metadata

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from wbdist.server import artifact_transfers, http, sessions, silence, stream, transfers, ui_routes
from wbdist.server.context import AppContext
from wbdist.server.gql import endpoint
from wbdist.server.refused import NotingRefusals

_log = logging.getLogger(__name__)


def version() -> str:
    """The installed version of wbdist; `0+source` when it runs from a checkout that is not installed."""
    try:
        return metadata.version("wbdist")
    except metadata.PackageNotFoundError:
        return "0+source"


def create_app(ctx: AppContext) -> Starlette:
    """The whole server over `ctx`. It closes nothing of it: whoever made the context does, after the app has stopped."""

    async def health(_request: Request) -> Response:
        return http.answer({"ok": True, "name": "wbdist", "version": version(), "pid": os.getpid()})

    async def no_telemetry(_request: Request) -> Response:
        # 404 to its first probe is how W&B's client learns that a server takes no telemetry.
        return http.refusal(404, "this server takes no telemetry")

    routes: list[BaseRoute] = [
        Route("/healthz", health, methods=["GET"]),
        Route("/sdk/otel/{rest:path}", no_telemetry, methods=["POST"]),
        *endpoint.routes(ctx),
        *stream.routes(ctx),
        *transfers.routes(ctx),
        *artifact_transfers.routes(ctx),
        *sessions.routes(ctx),
        *ui_routes.routes(ctx),  # last: /{entity}/{project} takes whatever is left
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(silence.watch(ctx))
        try:
            yield
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    app = Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(NotingRefusals, ctx.refused)])
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _fail)
    return app


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return http.refusal(error.status_code, error.detail)


async def _fail(request: Request, error: Exception) -> Response:
    """A 500: W&B's client sends the request again after some seconds, and so does ours."""
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return http.refusal(500, "the server failed to answer; its log has the reason")
