"""Bodies and answers: bounded reading, and errors in the one form that W&B's client shows to its user."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

_BODY_TIMEOUT = 120.0
"""Seconds for a whole body; W&B's client gives up on a file_stream request after 180."""


def answer(value: Any, status: int = 200) -> Response:
    """JSON. `value` must be strict JSON already (see `jsonvalues.plain`)."""
    return Response(orjson.dumps(value), status, media_type="application/json")


def refusal(status: int, message: str) -> Response:
    """An error in W&B's form. Always with a non-2xx status: its client takes errors in a 200 for a bug of ours."""
    headers = {"WWW-Authenticate": 'Basic realm="wbdist", charset="UTF-8"'} if status == 401 else None
    return Response(orjson.dumps({"errors": [{"message": message}]}), status, headers, "application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, decompressed when it is gzip; more than `limit` bytes (before or after) is a 413, broken gzip a 400."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "gzip"}:
        raise HTTPException(415, f"Content-Encoding {encoding!r} is not understood; send gzip or none")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {_BODY_TIMEOUT:.0f} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended inside the body") from None
    body = b"".join(chunks)
    return _gunzip(body, limit) if encoding == "gzip" else body


def _gunzip(body: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        plain = unpacker.decompress(body, limit)
    except zlib.error as error:
        raise HTTPException(400, f"the body is not gzip: {error}") from None
    if unpacker.unconsumed_tail:
        raise _too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise HTTPException(400, "the gzip body is cut short or has data behind its end")
    return plain


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than the {limit} bytes allowed here")
