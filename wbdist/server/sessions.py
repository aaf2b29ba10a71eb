"""How a browser logs in: the one-time address that the server prints, and the endpoints behind the login page."""

from __future__ import annotations

import json
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from wbdist.server import http
from wbdist.server.context import AppContext

LOGIN_PATH = "/login/once"
_MAX_BODY = 4096


def login_url(base_url: str, token: str, page: str = "/") -> str:
    """An address that logs in whoever opens it first, then shows `page`."""
    suffix = "" if page == "/" else f"&next={quote(page)}"
    return f"{base_url}{LOGIN_PATH}?token={token}{suffix}"


def routes(ctx: AppContext) -> list[BaseRoute]:
    """GET /login/once?token=; POST /api/ui/login {key}; POST /api/ui/logout; POST /api/ui/login-url {page}."""

    async def once(request: Request) -> Response:
        page = _local_page(request.query_params.get("next", "/"))
        value = ctx.auth.redeem(request.query_params.get("token", ""))
        response = RedirectResponse(page, 303, headers={"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})
        if value is not None:
            ctx.auth.set_cookie(response, value)
        # A used token leads to the same page: it opens with the session of its first use, and asks for the key without.
        return response

    async def login(request: Request) -> Response:
        if not (ctx.auth.own_host(request) and ctx.auth.own_origin(request)):
            return http.refusal(403, "log in from the server's own page, by its own address")
        value = ctx.auth.login(await _field(request, "key"))
        if value is None:
            return http.refusal(401, "this is not a key of this server; `wbdist server key` prints it")
        response = http.answer({"ok": True})
        ctx.auth.set_cookie(response, value)
        return response

    async def logout(request: Request) -> Response:
        if ctx.auth.check_request(request) is None:
            return http.refusal(401, "not logged in")
        response = http.answer({"ok": True})
        ctx.auth.clear_cookie(response)
        return response

    async def make_url(request: Request) -> Response:
        user = ctx.auth.check_request(request)
        if user is None:
            return http.refusal(401, "no valid API key")
        page = _local_page(await _field(request, "page") or "/")
        base = str(request.base_url).rstrip("/")
        return http.answer({"url": login_url(base, ctx.auth.login_token(user), page)})

    return [
        Route(LOGIN_PATH, once, methods=["GET"]),
        Route("/api/ui/login", login, methods=["POST"]),
        Route("/api/ui/logout", logout, methods=["POST"]),
        Route("/api/ui/login-url", make_url, methods=["POST"]),
    ]


def _local_page(page: str) -> str:
    """`page` if it is a path of ours, else the first page: a login must not forward to foreign sites."""
    safe = page.startswith("/") and not page.startswith("//") and "\\" not in page and page.isprintable()
    return page if safe else "/"


async def _field(request: Request, name: str) -> str:
    body = await http.read_body(request, _MAX_BODY)
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return ""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""
