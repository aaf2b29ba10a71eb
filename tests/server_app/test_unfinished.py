"""Heads of requests that never come to their end."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from wbdist.server.serve import AnnouncingServer, listen


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """Answers half a second after the whole body."""
    import asyncio

    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port() -> Iterator[int]:
    listener, number = listen("127.0.0.1", 0)
    config = uvicorn.Config(slow_app, log_level="warning", lifespan="off", timeout_keep_alive=30)
    started = threading.Event()
    server = AnnouncingServer(config, started.set, [], head_seconds=0.2)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    assert started.wait(30)
    yield number
    server.should_exit = True
    thread.join(30)


def closed_by_server(begun: bytes, port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(begun)
        try:
            return raw.recv(1000) == b""
        except TimeoutError:
            return False


def test_an_unfinished_head_is_given_up(port: int) -> None:
    """Proves that silence and half a head are closed, on a connection that was used before, too; and that neither a slow answer
    nor a slow body nor a quiet connection between requests is."""
    assert closed_by_server(b"", port)
    assert closed_by_server(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", port)
    quiet = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    quiet.putrequest("POST", "/")
    quiet.putheader("Content-Length", "2")
    quiet.endheaders(b"a")
    time.sleep(1.5)
    quiet.send(b"b")
    assert quiet.getresponse().read() == b"ok"
    used = quiet.sock
    time.sleep(1.5)
    quiet.request("GET", "/")
    assert quiet.getresponse().read() == b"ok"
    assert quiet.sock is used
    used.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
    assert used.recv(1000) == b""
