"""What the server refused, in its log: who asked for what, and why it was not given. Never a key, never a flood."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger(__name__)

WINDOW = 60.0
LINES = 20
"""Lines in so many seconds for one who asks; a client that goes wrong goes wrong at every request."""
_ASKERS = 1000
_LONGEST = 300
_USUAL = frozenset({409})
"""Answers of the protocol: where to send again, and that a newer attempt has the run."""


class _Errors(msgspec.Struct):
    errors: list[dict[str, str]]


class RefusalLog:
    """Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: dict[str, tuple[float, int]] = {}
        """who -> when his window began, and what was refused to him since."""

    def note(self, who: str, what: str, why: str) -> None:
        """One line at WARNING, whatever bytes a stranger put into its parts; beyond LINES in a window they are only counted."""
        now = self._clock()
        with self._lock:
            began, count = self._lines.pop(who, (now, 0))
            missed = max(0, count - LINES) if now - began >= WINDOW else 0
            if now - began >= WINDOW:
                began, count = now, 0
            self._lines[who] = (began, count + 1)  # behind all others: the first is who was refused longest ago
            if len(self._lines) > _ASKERS:
                del self._lines[next(iter(self._lines))]
        if missed:
            _log.warning("%s: %d more requests of that minute were refused", who, missed)
        if count < LINES:
            _log.warning("refused to %s: %s: %s", who, _plain(what), _plain(why))


def _plain(text: str) -> str:
    return ascii(text[:_LONGEST])[1:-1]


class NotingRefusals:
    """ASGI middleware: every answer 4xx is noted, but for those that are the protocol's own, and telemetry's."""

    def __init__(self, app: ASGIApp, log: RefusalLog) -> None:
        self._app = app
        self._noted = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, body = 0, b""

        async def noting(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif 400 <= status < 500 and len(body) < 4 * _LONGEST:
                body += message.get("body", b"")
            await send(message)

        await self._app(scope, receive, noting)
        path = scope.get("raw_path", b"").decode("latin-1").partition("?")[0]
        if 400 <= status < 500 and status not in _USUAL and not path.startswith("/sdk/otel/"):
            # Without the query, which may hold a token.
            self._noted.note((scope.get("client") or ("nobody",))[0], f"{scope['method']} {path}", f"{status} {_reason(body)}")


def _reason(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Errors).errors[0].get("message", "")
    except (msgspec.DecodeError, IndexError):
        return ""
