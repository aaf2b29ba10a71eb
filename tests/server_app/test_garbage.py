"""Garbage at every endpoint of a real server: never a 5xx, never a hang, and it serves on."""

from __future__ import annotations

import gzip
import json
import random
import socket
import zlib
from typing import Any

import pytest
import requests

PATHS = [
    "/graphql", "/files/local/p/r/file_stream", "/files/local/p/r/content/x", "/sdk/otel/v1/logs", "/healthz", "/login/once",
    "/api/ui/login", "/api/ui/logout", "/api/ui/login-url", "/files/%00/p/r/file_stream", "/files/../x/%2e%2e/file_stream",
    "/files/local/" + "p" * 300 + "/r/file_stream", "/files/lo%0acal/p/r%ff/file_stream", "/nosuch",
]  # fmt: skip

DEEP = "[" * 100_000
BODIES = [
    b"", b"{}", b"[]", b"null", b"\xff\xfe\x00", b"{" * 1000, DEEP.encode(), b'"\xed\xa0\x80"', b"0" * 100_000,
    b'{"query": 3}', b'{"query": "{viewer{id}}", "variables": []}', b'{"query": "\\ud800"}',
    b'{"query": "{ viewer { \\u0000 } }"}',
    b'{"query": "query Q($a: JSONString) { viewer { id } }", "variables": {"a": {}}}',
    b'{"files": {"wandb-history.jsonl": {"offset": -1, "content": []}}}',
    b'{"files": {"wandb-history.jsonl": {"offset": 99999999999999999999, "content": ["{}"]}}}',
    b'{"files": {"wandb-history.jsonl": {"offset": 0, "content": [1]}}}',
    b'{"files": {"wandb-history.jsonl": {"offset": 0, "content": ["not json", "[]", "{}", "{\\"_step\\": \\"x\\"}"]}}}',
    b'{"files": {"wandb-history.jsonl": {"offset": 0, "content": ["{\\"_step\\": 1e400, \\"a\\": 1e400}"]}}}',
    json.dumps({"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"_step": 0, "x": ' + "9" * 400 + "}"]}}}).encode(),
    json.dumps({"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"_step": 0, "x": ' + DEEP]}}}).encode(),
    json.dumps({"files": {"wandb-events.jsonl": {"offset": 0, "content": ["nonsense", "\x00"]}}}).encode(),
    json.dumps({"files": {"wandb-summary.json": {"offset": 0, "content": [DEEP]}}}).encode(),
    json.dumps({"files": {"output.log": {"offset": 5, "content": ["\ud800 \x00 \n"]}}}).encode(),
    b'{"files": {"../../etc/passwd": {"offset": 0, "content": ["x"]}}, "exitcode": "0"}',
    b'{"complete": true, "exitcode": 1e999}', b'{"wbdist": {"attempt": -1, "nonce": "", "writer": ""}}',
    b'{"wbdist": {"attempt": 1, "nonce": "n", "writer": "w", "seq": {"wandb-history.jsonl": -5}}}',
    b'{"key": {}}', b'{"key": "\\u0000"}', b'{"page": "\\n"}',
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_garbage_is_never_a_5xx(server: Any, path: str) -> None:
    """Proves that every endpoint answers every method and body with a proper status, with and without a key."""
    session = requests.Session()
    for auth in (("api", server.key), None):
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD"):
            for body in BODIES if method in {"POST", "PUT"} else [b""]:
                answer = session.request(method, server.url + path, data=body, auth=auth, timeout=10, allow_redirects=False)
                assert answer.status_code < 500, (method, path, body[:80], answer.text[:200])
                if answer.status_code >= 400 and method != "HEAD":
                    assert answer.json()["errors"][0]["message"] is not None
    assert session.get(server.url + "/healthz", timeout=10).json()["ok"] is True


@pytest.mark.parametrize("path", ["/graphql", "/files/local/gz/r/file_stream"])
def test_compressed_bodies_are_bounded(server: Any, path: str) -> None:
    """Proves that gzip works, a bomb is 413, and broken or unknown compression 4xx."""

    def send(body: bytes, encoding: str = "gzip") -> int:
        return int(server.post(path, data=body, headers={"Content-Encoding": encoding}).status_code)

    good = b'{"query": "{ viewer { id } }"}' if path == "/graphql" else b"{}"
    assert send(gzip.compress(good)) == 200
    assert send(zlib.compress(good)) == 400
    assert send(gzip.compress(good)[:-3]) == 400
    assert send(gzip.compress(good) + b"x") == 400
    assert send(gzip.compress(b" " * (80 * 2**20), 9)) == 413
    assert send(good, "br") == 415


def test_random_bytes_and_halves(server: Any) -> None:
    """Proves that raw garbage and requests that end in the middle neither kill nor block the server."""
    random.seed(7)
    for size in (1, 10, 1000, 100_000):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            raw.sendall(random.randbytes(size))
    hanging = []
    for _ in range(20):
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        raw.sendall(b"POST /graphql HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        hanging.append(raw)
    assert requests.get(server.url + "/healthz", timeout=60).json()["ok"] is True
    for raw in hanging:
        raw.close()


def test_mutated_requests(server: Any) -> None:
    """Proves with 300 random mutations of good requests that none is a 5xx."""
    random.seed(11)
    stamped = {
        "files": {
            "wandb-history.jsonl": {"offset": 0, "content": ['{"_step":0,"a":NaN}']},
            "output.log": {"offset": 0, "content": ["x"]},
        },
        "wbdist": {"attempt": 1, "nonce": "n", "writer": "w", "seq": {"wandb-history.jsonl": 0, "output.log": 0}},
        "complete": True,
        "exitcode": 0,
    }
    graphql = {
        "query": 'mutation M($c: JSONString) { upsertBucket(input: {name: "mut", config: $c}) { inserted } }',
        "variables": {"c": '{"a":{"value":1}}'},
    }
    session = requests.Session()
    session.auth = ("api", server.key)
    for index in range(300):
        path, value = ("/graphql", graphql) if index % 3 == 0 else ("/files/local/mut/r/file_stream", stamped)
        text = bytearray(json.dumps(value).encode())
        for _ in range(random.randint(1, 4)):
            text[random.randrange(len(text))] = random.choice(b'{}[]",:0x\\-n\x00\xff9')
        answer = session.post(server.url + path, data=bytes(text), timeout=10)
        assert answer.status_code < 500, (text, answer.text)
