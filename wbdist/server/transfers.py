"""File transfer: PUT and GET of a run's files under addresses that authenticate themselves.

W&B's client PUTs without its Authorization header and does not resolve relative URLs, so an address is absolute, signed,
and good for one method, one file and some hours.
"""

from __future__ import annotations

import hmac
import math
import mimetypes
import re
from urllib.parse import quote

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from wbdist.core.position import CONSOLE
from wbdist.protocol import file_stream
from wbdist.protocol.attempts import STAMP_HEADER, FileStamp, StreamAnswer
from wbdist.protocol.file_stream import StreamReply
from wbdist.server import access, console_file, uploads
from wbdist.server.auth import User
from wbdist.server.context import AppContext
from wbdist.server.files import normal_name
from wbdist.server.store.files import FileVersion
from wbdist.server.store.interface import RunRow

SAFE_HEADERS = {"Content-Security-Policy": "sandbox", "X-Content-Type-Options": "nosniff"}
"""Of a download, beside being an attachment: an uploaded HTML page must not act with its viewer's session."""
_LARGEST = 2**53


def transfer_url(ctx: AppContext, base_url: str, run: RunRow, name: str, method: str) -> str:
    """The address for one PUT, or for any number of GETs (and HEADs), of one file during `transfer_seconds`."""
    until = str(math.ceil(ctx.clock() + ctx.settings.transfer_seconds))
    path = "/".join(quote(part, safe="") for part in (run.entity, run.project, run.run_id))
    signature = _sign(ctx, run, name, method, until)
    return f"{base_url}/files/{path}/content/{quote(name, safe='/')}?method={method}&until={until}&signature={signature}"


def _sign(ctx: AppContext, run: RunRow, name: str, method: str, until: str) -> str:
    return ctx.auth.sign("transfer", str(run.pk), run.run_id, name, method, until)


def routes(ctx: AppContext) -> list[BaseRoute]:
    """PUT, GET and HEAD on /files/{entity}/{project}/{run}/content/{name}."""

    async def resolve(request: Request, method: str) -> tuple[RunRow, str]:
        params = request.path_params
        try:
            name = normal_name(params["name"])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        run = await run_in_threadpool(ctx.store.find_run, params["entity"], params["project"], params["run"])
        query = request.query_params
        until = query.get("until", "")
        signed = (
            run is not None
            and query.get("method") == method
            and hmac.compare_digest(query.get("signature", "").encode(), _sign(ctx, run, name, method, until).encode())
            and int(until) > ctx.clock()
        )
        user = ctx.auth.check_request(request)
        if not signed and user is None:
            raise HTTPException(
                403, "this file address is not signed, or no longer good; ask for a new one, or send an API key"
            )
        if not signed and user is not None:
            _check_right(user, params["entity"], params["project"], name, method)
        if run is None:
            raise HTTPException(404, "the run does not exist")
        return run, name

    async def put(request: Request) -> Response:
        run, name = await resolve(request, "PUT")
        if run.view is not None:
            raise HTTPException(403, f"{run.run_id} is an incarnation of a run that is over; files go to the run itself")
        stamp = _stamp(request)
        content = await uploads.receive(ctx, request)
        version = FileVersion(
            name=name,
            sha256=content.sha256,
            md5=content.md5,
            size=content.size,
            mimetype=mimetypes.guess_type(name)[0] or "application/octet-stream",
            updated_at=ctx.clock(),
        )
        filed = await run_in_threadpool(ctx.store.files.add, run.pk, version, stamp)
        if filed.code == "":
            return Response(status_code=200)
        assert stamp is not None
        if filed.code == "unknown":
            raise HTTPException(404, f"attempt {stamp.attempt} of this run was never begun here; send BeginAttempt first")
        message = f"attempt {stamp.attempt} of this run is superseded by attempt {filed.attempt}; its file is in the archive"
        reply = StreamReply(error=message, wbdist=StreamAnswer(code="fenced", attempt=filed.attempt))
        return Response(file_stream.encode_reply(reply), 409, media_type="application/json")

    async def get(request: Request) -> Response:
        run, name = await resolve(request, "GET")
        version = await run_in_threadpool(ctx.store.files.get, run, name)
        if version is None and name == CONSOLE and await run_in_threadpool(ctx.console_files.of, ctx, run) is not None:
            lines, asked = run.line_counts[CONSOLE], request.query_params.get("lines", "")
            # As many as there were when the address was given, with the file's size and digest.
            printed = console_file.contents(ctx, run, min(lines, int(asked)) if re.fullmatch("[0-9]{1,17}", asked) else lines)
            headers = {**SAFE_HEADERS, "Content-Disposition": f'attachment; filename="{CONSOLE}"'}
            return StreamingResponse(printed, headers=headers, media_type="text/plain")
        if version is None:
            raise HTTPException(404, f"{name} was not uploaded")
        filename = name.rpartition("/")[2]
        path = ctx.files.path(version.sha256)
        return FileResponse(path, headers=SAFE_HEADERS, media_type=version.mimetype, filename=filename)

    path = "/files/{entity}/{project}/{run}/content/{name:path}"
    return [Route(path, put, methods=["PUT"]), Route(path, get, methods=["GET", "HEAD"])]


def _check_right(user: User, entity: str, project: str, name: str, method: str) -> None:
    if method == "PUT" and (refused := access.why_not_write(user, entity, project)) is not None:
        raise HTTPException(*refused)
    if not (access.may_read(user, entity, project) and access.may_read_file(user, entity, name)):
        raise HTTPException(404, "the run does not exist, or is not for you to see")


def _stamp(request: Request) -> FileStamp | None:
    """Our client's; refuses with 400 one that makes no sense."""
    text = request.headers.get(STAMP_HEADER)
    if text is None:
        return None
    try:
        stamp = msgspec.json.decode(text, type=FileStamp)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise HTTPException(400, f"{STAMP_HEADER} is not a stamp: {error}") from None
    numbers = (stamp.attempt, stamp.seq, 0 if stamp.step is None else stamp.step + 1)
    if not all(0 <= number < _LARGEST for number in numbers) or stamp.attempt >= 2**31:
        raise HTTPException(
            400, f"{STAMP_HEADER}: attempt, seq and step must be numbers from 0 (step from -1) that a run can have"
        )
    if not all(1 <= len(text) <= 128 for text in (stamp.nonce, stamp.writer)):
        raise HTTPException(400, f"{STAMP_HEADER}: nonce and writer must have 1 to 128 characters")
    return stamp
