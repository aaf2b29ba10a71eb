"""File transfer: PUT and GET of a run's files under addresses that authenticate themselves.

W&B's client PUTs without its Authorization header and does not resolve relative URLs, so an address is absolute, signed,
and good for one method, one file and some hours.
"""

from __future__ import annotations

import hmac
import math
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from wbdist.server.context import AppContext
from wbdist.server.files import normal_name
from wbdist.server.store.interface import RunRow

_WRITE_BLOCK = 2**20


def transfer_url(ctx: AppContext, base_url: str, run: RunRow, name: str, method: str) -> str:
    """The address for one PUT, or for any number of GETs (and HEADs), of one file during `transfer_seconds`."""
    until = str(math.ceil(ctx.clock() + ctx.settings.transfer_seconds))
    path = "/".join(quote(part, safe="") for part in (run.entity, run.project, run.run_id))
    signature = _sign(ctx, run.pk, name, method, until)
    return f"{base_url}/files/{path}/content/{quote(name, safe='/')}?method={method}&until={until}&signature={signature}"


def _sign(ctx: AppContext, run: int, name: str, method: str, until: str) -> str:
    return ctx.auth.sign("transfer", str(run), name, method, until)


def routes(ctx: AppContext) -> list[BaseRoute]:
    """PUT, GET and HEAD on /files/{entity}/{project}/{run}/content/{name}."""

    async def resolve(request: Request, method: str) -> tuple[RunRow, str]:
        params = request.path_params
        try:
            name = normal_name(params["name"])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        run = await run_in_threadpool(ctx.store.get_run, params["entity"], params["project"], params["run"])
        query = request.query_params
        until = query.get("until", "")
        signed = (
            run is not None
            and query.get("method") == method
            and hmac.compare_digest(query.get("signature", "").encode(), _sign(ctx, run.pk, name, method, until).encode())
            and int(until) > ctx.clock()
        )
        if not signed and ctx.auth.check_request(request) is None:
            raise HTTPException(
                403, "this file address is not signed, or no longer good; ask for a new one, or send an API key"
            )
        if run is None:
            raise HTTPException(404, "the run does not exist")
        return run, name

    async def put(request: Request) -> Response:
        run, name = await resolve(request, "PUT")
        limit = ctx.settings.max_file_bytes
        writer = await run_in_threadpool(ctx.files.writer, run.pk, name)
        with writer:
            pending = bytearray()
            try:
                async for chunk in request.stream():
                    pending += chunk
                    if writer.size + len(pending) > limit:
                        raise HTTPException(413, f"a file may have at most {limit} bytes")
                    if len(pending) >= _WRITE_BLOCK:
                        await run_in_threadpool(writer.write, bytes(pending))
                        pending.clear()
            except ClientDisconnect:
                raise HTTPException(400, "the connection ended inside the file; nothing was stored") from None
            await run_in_threadpool(writer.write, bytes(pending))
            await run_in_threadpool(writer.commit, ctx.clock())
        return Response(status_code=200)

    async def get(request: Request) -> Response:
        run, name = await resolve(request, "GET")
        record = await run_in_threadpool(ctx.files.get, run.pk, name)
        if record is None:
            raise HTTPException(404, f"{name} was not uploaded")
        # As an attachment in a sandbox: an uploaded HTML page must not act with its viewer's session.
        headers = {"Content-Security-Policy": "sandbox", "X-Content-Type-Options": "nosniff"}
        filename = name.rpartition("/")[2]
        return FileResponse(ctx.files.path(run.pk, record), headers=headers, media_type=record.mimetype, filename=filename)

    path = "/files/{entity}/{project}/{run}/content/{name:path}"
    return [Route(path, put, methods=["PUT"]), Route(path, get, methods=["GET", "HEAD"])]
