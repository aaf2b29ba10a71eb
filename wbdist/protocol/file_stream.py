"""The file_stream endpoint as values: one request carries lines, summary, marks and the end of a run; one answer comes back.

`POST /files/{entity}/{project}/{run_id}/file_stream`. W&B's servers read the W&B fields and ignore `wbdist`.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import msgspec

from wbdist.protocol.attempts import StreamAnswer, StreamStamp

MAX_LINE_BYTES = 10 * 2**20 - 100 * 2**10
"""A longer history, event or summary line is refused by W&B."""
MAX_REQUEST_BYTES = 10 * 2**20
"""About where W&B's client cuts one request into several."""

Offset = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class FileChunk(msgspec.Struct, frozen=True):
    """Consecutive lines of one file; `offset` is the line number of the first, in the live view."""

    content: list[str] = []
    offset: Offset = 0


class StreamRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """All fields are optional; an empty request is a heartbeat."""

    files: dict[str, FileChunk] = {}
    uploaded: list[str] = []
    """Names of run files that were PUT since the last request."""
    preempting: bool = False
    complete: bool = False
    exitcode: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**32)] | None = None
    """Goes with `complete`."""
    wbdist: StreamStamp | None = None


class StreamReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of any answer. W&B's client reads `stopped` alone."""

    stopped: bool = False
    """True: a person asked the run to stop."""
    error: str = ""
    """Why the request was refused; '' when it was not."""
    wbdist: StreamAnswer | None = None


_decode_request = msgspec.json.Decoder(StreamRequest).decode
_decode_reply = msgspec.json.Decoder(StreamReply).decode
_encode = msgspec.json.Encoder().encode


def path(entity: str, project: str, run_id: str) -> str:
    """The endpoint's path below the base URL."""
    return "/files/" + "/".join(quote(part, safe="") for part in (entity, project, run_id)) + "/file_stream"


def encode_request(request: StreamRequest) -> bytes:
    """The request's body."""
    return _encode(request)


def decode_request(body: bytes) -> StreamRequest:
    """Raises ValueError (naming the field) when `body` is not a file_stream request. An empty body is a heartbeat."""
    if not body.strip():
        return StreamRequest()
    try:
        return _decode_request(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a file_stream request: {error}") from error


def encode_reply(reply: StreamReply) -> bytes:
    """The answer's body, for any status."""
    return _encode(reply)


def decode_reply(body: bytes) -> StreamReply:
    """The answer of any server; what is not understood counts as an empty answer, as W&B's client has it.

    Look at the HTTP status first: 2xx stored; 409 with `wbdist.code` 'gap' or 'fenced'; other 4xx final; the rest retry.
    """
    try:
        return _decode_reply(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return StreamReply()
