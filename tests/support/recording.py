"""A loopback proxy that writes down what a client and a server say to each other."""

from __future__ import annotations

import gzip
import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit


class Exchange(NamedTuple):
    """One request and its answer; bodies that are JSON are decoded."""

    method: str
    path: str
    headers: dict[str, str]
    sent: Any
    status: int
    answer: Any


def _decoded(body: bytes, encoding: str) -> Any:
    if encoding == "gzip":
        body = gzip.decompress(body)
    try:
        return json.loads(body)
    except ValueError:
        return body


class Recorder:
    """Listens on loopback and passes everything on to `server_url`. Use as a context manager.

    `times`: each request goes to the server so often, as if the answers before had been lost; the last one is given back.
    """

    def __init__(self, server_url: str, times: int = 1) -> None:
        self.exchanges: list[Exchange] = []
        target = urlsplit(server_url)
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                for _ in range(times):
                    # The Host header goes along: the server makes the addresses of uploads from it.
                    connection = http.client.HTTPConnection(target.hostname or "", target.port or 80, timeout=30)
                    try:
                        connection.request(self.command, self.path, body, dict(self.headers.items()))
                        answer = connection.getresponse()
                        content = answer.read()
                    finally:
                        connection.close()
                recorder.exchanges.append(
                    Exchange(
                        self.command,
                        self.path,
                        {name.lower(): value for name, value in self.headers.items()},
                        _decoded(body, self.headers.get("Content-Encoding") or ""),
                        answer.status,
                        _decoded(content, answer.headers.get("Content-Encoding") or ""),
                    )
                )
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _pass_on  # noqa: N815  (http.server's names)

            def log_message(self, *_arguments: object) -> None:
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def shape(value: Any) -> Any:
    """The types of a JSON value: {"a": 1} -> {"a": {"number"}}; a string that holds a JSON object has that object's shape."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    if isinstance(value, str):
        return {"json"} if value.startswith("{") else {"string"}
    if isinstance(value, bool):
        return {"boolean"}
    return {"null"} if value is None else {"number"}
