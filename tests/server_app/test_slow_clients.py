"""Clients that begin and do not go on: they hold up nobody, and nothing of what they began is stored."""

# ruff: noqa: E501  (raw requests)

from __future__ import annotations

import contextlib
import socket
from typing import Any

import requests

from wbdist.protocol import operations

BEGUN = [
    b"",
    b"POST /graph",
    b"POST /graphql HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    b"POST /files/local/slow/r/file_stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 500\r\n\r\n{",
    b"PUT /files/local/slow/r/content/half HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 5000000\r\n\r\nhalf",
    b"PUT /files/local/slow/r/content/half HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
]


def test_hundreds_of_unfinished_requests_hold_up_nobody(server: Any) -> None:
    """Proves with 300 connections, half of them closed in one direction: others are served, and no half file or line is there."""
    server.post("/graphql", data=operations.upsert_run(project="slow", run_id="r").body())
    with contextlib.ExitStack() as stack:
        for number in range(300):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            begun = BEGUN[number % len(BEGUN)]
            raw.sendall(begun % server.key.encode() if b"%s" in begun else begun)
            if number % 2:
                raw.shutdown(socket.SHUT_WR)
        assert requests.get(server.url + "/healthz", timeout=10).json()["ok"] is True
        whole = requests.put(
            server.url + "/files/local/slow/r/content/whole", data=b"1" * 3_000_000, auth=("api", server.key), timeout=10
        )
        assert whole.status_code == 200
    query = '{ project(name: "slow") { run(name: "r") { historyLineCount files { edges { node { name } } } } } }'
    run = server.graphql(query)["project"]["run"]
    assert (run["historyLineCount"], [edge["node"]["name"] for edge in run["files"]["edges"]]) == (0, ["whole"])
