"""The routes of the web pages: the page, its files, and the JSON and live updates behind it (/api/ui).

/api/ui answers browsers with a session and programs with an API key; it is no public API and changes with the pages.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from wbdist.core.position import CONSOLE
from wbdist.server import access, http
from wbdist.server.context import AppContext
from wbdist.server.store.alerts import alerts_of
from wbdist.server.store.interface import RunRow
from wbdist.server.ui import pages, views
from wbdist.server.ui.live import LiveUpdates, TooManyStreamsError, Watched

MAX_RUNS = 1000
"""Runs in one table."""
MAX_SERIES = 1000
"""Lines in one answer."""
MAX_CONSOLE_LINES = 5000
_MAX_BODY = 2**18


class SeriesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST …/series: every key of every run, at most `buckets` points each."""

    runs: Annotated[list[str], msgspec.Meta(max_length=MAX_SERIES)]
    keys: Annotated[list[str], msgspec.Meta(max_length=MAX_SERIES)]
    buckets: Annotated[int, msgspec.Meta(ge=2, le=5000)] = 500


Handler = Callable[[Request], Awaitable[Response]]


def routes(ctx: AppContext) -> list[BaseRoute]:
    """GET / and the pages' other addresses, /static, and below /api/ui (which needs a login): me, projects, and for a project
    runs, runs/{run}, runs/{run}/console, events; POST series. They go behind all other routes: `/{entity}/{project}` is greedy.
    """
    store = ctx.store
    live = LiveUpdates(store, ctx.clock)
    ctx.on_stop.append(live.stopping.set)

    def for_users(handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            user = ctx.auth.check_request(request)
            if user is None:
                # Without WWW-Authenticate, which would make browsers ask for a password in a box of their own.
                response: Response = http.refusal(401, "log in with an API key; `wbdist server key` prints it")
                del response.headers["WWW-Authenticate"]
            elif "project" in request.path_params and not access.may_read(user, *_place(request)):
                response = http.refusal(404, f"there is no project {'/'.join(_place(request))} that you may see")
            else:
                response = await handler(request)
            response.headers["Cache-Control"] = "no-store"
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        return checked

    async def me(request: Request) -> Response:
        """Who is logged in; null for nobody: that is an answer, not an error that a browser would report on its console."""
        user = ctx.auth.check_request(request)
        answer = http.answer({"user": None if user is None else {"name": user.name, "entity": user.entity}})
        answer.headers["Cache-Control"] = "no-store"
        return answer

    def see(request: Request, run: RunRow) -> RunRow:
        user = ctx.auth.check_request(request)
        assert user is not None
        return access.shown(user, run)

    async def projects(request: Request) -> Response:
        user = ctx.auth.check_request(request)
        assert user is not None
        rows = await run_in_threadpool(store.list_projects)
        found = [row for row in rows if access.may_read(user, row["entity"], row["project"])]
        return http.answer({"projects": [views.project(row) for row in found], "now": ctx.clock()})

    async def runs(request: Request) -> Response:
        """All runs, or those of ?group=, or those named by ?run= (any number of times)."""
        entity, project = _place(request)
        wanted = request.query_params.getlist("run")[:MAX_RUNS]
        group = request.query_params.get("group")

        def read() -> dict[str, Any]:
            if wanted:
                found = [run for run_id in wanted if (run := store.find_run(entity, project, run_id)) is not None]
            else:
                found = store.list_runs(entity, project, group=group, limit=MAX_RUNS)
            return {"runs": [views.table_row(see(request, run)) for run in found], "limit": MAX_RUNS, "now": ctx.clock()}

        return http.answer(await run_in_threadpool(read))

    def get_run(request: Request) -> RunRow:
        entity, project = _place(request)
        run = store.find_run(entity, project, request.path_params["run"])
        if run is None:
            raise HTTPException(404, f"there is no run {request.path_params['run']} in {entity}/{project}")
        return run

    async def run(request: Request) -> Response:
        def read() -> dict[str, Any]:
            found = see(request, get_run(request))
            return {"run": views.run_page(found, store.attempts(found.pk), alerts_of(store, found)), "now": ctx.clock()}

        return http.answer(await run_in_threadpool(read))

    async def console(request: Request) -> Response:
        """The last ?last= lines, or those from ?first= on; `first` in the answer is the number of the first one."""
        last = _number(request, "last", 500, most=MAX_CONSOLE_LINES)
        asked = _number(request, "first", -1, most=2**62)

        def read() -> dict[str, Any]:
            found = get_run(request)
            total = found.line_counts.get(CONSOLE, 0)
            first = max(0, total - last) if asked < 0 else asked
            lines = store.console(found.pk, first=first, limit=MAX_CONSOLE_LINES, attempt=found.view) if first < total else []
            return {"first": first, "total": total, "lines": lines}

        return http.answer(await run_in_threadpool(read))

    async def series(request: Request) -> Response:
        try:
            asked = msgspec.json.decode(await http.read_body(request, _MAX_BODY), type=SeriesRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HTTPException(400, f"not a request for series: {error}") from None
        if len(asked.runs) * len(asked.keys) > MAX_SERIES:
            raise HTTPException(400, f"{len(asked.runs)} runs x {len(asked.keys)} keys; at most {MAX_SERIES} lines at once")
        entity, project = _place(request)

        def read() -> dict[str, Any]:
            out: list[dict[str, Any]] = []
            for run_id in dict.fromkeys(asked.runs):
                found = store.find_run(entity, project, run_id)
                if found is not None:
                    known = sorted(set(asked.keys).intersection(found.metrics))
                    made = store.many_series(found.pk, known, buckets=asked.buckets, attempt=found.view)
                    out += [views.series(run_id, key, made.get(key, [])) for key in known]
            return {"series": out}

        return http.answer(await run_in_threadpool(read))

    async def events(request: Request) -> Response:
        entity, project = _place(request)
        query = request.query_params
        try:
            return live.stream(Watched(entity, project, query.get("group"), query.get("run")))
        except TooManyStreamsError:
            raise HTTPException(503, "too many pages are open on this server; this one is not live for now") from None

    place = "/api/ui/{entity}/{project}"
    compressed = [Middleware(GZipMiddleware, minimum_size=4096, compresslevel=4)]
    return [
        Route("/api/ui/me", me, methods=["GET"]),
        Route("/api/ui/projects", for_users(projects), methods=["GET"], middleware=compressed),
        Route(f"{place}/runs", for_users(runs), methods=["GET"], middleware=compressed),
        Route(f"{place}/runs/{{run}}", for_users(run), methods=["GET"], middleware=compressed),
        Route(f"{place}/runs/{{run}}/console", for_users(console), methods=["GET"], middleware=compressed),
        Route(f"{place}/series", for_users(series), methods=["POST"], middleware=compressed),
        Route(f"{place}/events", for_users(events), methods=["GET"]),
        *pages.routes(),
    ]


def _place(request: Request) -> tuple[str, str]:
    return request.path_params["entity"], request.path_params["project"]


def _number(request: Request, name: str, default: int, *, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) > most:
        raise HTTPException(400, f"{name}={text!r} must be a number from 0 to {most}")
    return int(text)
