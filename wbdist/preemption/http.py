"""An HTTP request as a preemption notice: for controllers, dashboards and `curl` on the machine itself.

curl -X POST localhost:8000/stop -d '{"reason": "maintenance at six", "seconds": 120}'
"""

from __future__ import annotations

import hmac
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from wbdist.errors import UsageError
from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.preemption")

LONGEST_BODY = 10_000
LONGEST = 365 * 86400.0
"""Seconds ahead that a notice may be."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Body(msgspec.Struct):
    reason: str | None = None
    seconds: float | None = None


class HttpSource:
    """Listens for `POST /stop`. Beyond loopback a token is demanded, as `Authorization: Bearer <token>`."""

    def __init__(self, address: str, token: str = "") -> None:
        """`address`: `8000` or `host:8000`. Raises UsageError for another, and for an open door without a token."""
        host, _, port = address.rpartition(":")
        self._host = host.strip("[]") or LOOPBACK[0]
        if not port.isdigit() or int(port) > 65535:
            raise UsageError(f"http={address!r} is no address; give a port, or host:port")
        if self._host not in LOOPBACK and not token:
            raise UsageError(
                f"http={address}: others than this machine may stop the job then; set WBDIST_NOTICE_TOKEN to a secret"
            )
        self._port, self._token = int(port), token
        self._server: ThreadingHTTPServer | None = None

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        return self._port if self._server is None else int(self._server.server_address[1])

    def start(self, tell: Callable[[Notice], bool]) -> None:
        """Any thread. Raises UsageError when the port is taken, or the source was started before."""
        if self._server is not None:
            raise UsageError("this HttpSource was started before; make another")
        try:
            self._server = _Server(self._host, self._port, _handler(tell, self._token))
        except OSError as error:
            raise UsageError(f"http={self._host}:{self._port} cannot be listened on: {error}") from error
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="wbdist-http-notice", daemon=True).start()

    def close(self) -> None:
        """Any thread. Idempotent; within a second."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks DNS for the name of this address: where that is slow, for seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            log.info("http: %s went away in the middle of its request", client_address)
        else:
            super().handle_error(request, client_address)


def _handler(tell: Callable[[Notice], bool], token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # for a client that says nothing

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length") or "0"
            if self.path != "/stop":
                self.send_error(404)
            elif not length.isdecimal() or int(length) > LONGEST_BODY:
                self.send_error(413)
            elif token and not hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()):
                self.send_error(401)
            else:
                self._take(self.rfile.read(int(length)))

        def _take(self, raw: bytes) -> None:
            try:
                body = msgspec.json.decode(raw, type=_Body) if raw.strip() else _Body()
                if body.seconds is not None and not 0 <= body.seconds < LONGEST:
                    raise msgspec.ValidationError(f"seconds={body.seconds:g} is no time that may be left")
            except msgspec.MsgspecError as error:
                self.send_error(400, explain=f'{error}; send {{"reason": "...", "seconds": 120}}, or nothing')
                return
            deadline = None if body.seconds is None else time.time() + body.seconds
            tell(Notice("http", body.reason or "POST /stop", time.monotonic(), deadline))
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    return Handler
