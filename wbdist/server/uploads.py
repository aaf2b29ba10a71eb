"""Receiving a body into the file store, whatever it is the content of."""

from __future__ import annotations

import asyncio

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from wbdist.server.context import AppContext
from wbdist.server.files import Content, FullDiskError

_WRITE_BLOCK = 2**20
_STALL = 120.0
"""Seconds that a body may stand still; a file as a whole may take as long as it takes."""


async def receive(ctx: AppContext, request: Request) -> Content:
    """The request's body, on disk. Refuses with 400 (cut short), 408 (stalled), 413 (too large) or 507 (full disk); nothing is
    left of it then."""
    limit = ctx.settings.max_file_bytes
    _check_length(request, limit)
    try:
        with await run_in_threadpool(ctx.files.writer) as writer:
            pending = bytearray()
            chunks = aiter(request.stream())
            while True:
                async with asyncio.timeout(_STALL):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                pending += chunk
                if writer.size + len(pending) > limit:
                    raise _too_large(limit)
                if len(pending) >= _WRITE_BLOCK:
                    await run_in_threadpool(writer.write, bytes(pending))
                    pending.clear()
            await run_in_threadpool(writer.write, bytes(pending))
            return await run_in_threadpool(writer.keep)
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended inside the file; nothing was stored") from None
    except TimeoutError:
        raise HTTPException(408, f"nothing of the file arrived for {_STALL:.0f} s; nothing was stored") from None
    except FullDiskError as error:
        raise HTTPException(507, str(error)) from None


def _check_length(request: Request, limit: int) -> None:
    """Refuses what says itself that it is too large before any of it is received."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"a file may have at most {limit} bytes")
