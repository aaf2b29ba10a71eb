"""`output.log` of runs that upload none: it is made of their lines."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from wbdist.core.position import CONSOLE, Watermark
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server import console_file
from wbdist.server.app import create_app
from wbdist.server.auth import User
from wbdist.server.context import AppContext

FILES = """query($n: [String], $r: String!) { project(name: "p", entityName: "local") { run(name: $r) { fileCount
    files(names: $n) { edges { node { id name sizeBytes md5 mimetype directUrl } } } } } }"""
AT = "2026-11-21T03:17:59.296781 "


class Printing:
    """A run of ours, its lines and its files."""

    def __init__(self, ctx: AppContext, client: TestClient) -> None:
        self._client = client
        self._ask('mutation { upsertBucket(input: {modelName: "p", name: "r", config: "{}"}) { inserted } }')
        run = ctx.store.get_run("local", "p", "r")
        assert run is not None
        self._store, self._pk, self._seq = ctx.store, run.pk, 0
        self.begin(1)

    def _ask(self, query: str, **variables: Any) -> Any:
        answer = self._client.post("/graphql", json={"query": query, "variables": variables})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def begin(self, attempt: int, base: Watermark | None = None) -> None:
        self._attempt, self._seq = attempt, 0
        begun = self._store.begin_attempt(
            self._pk, BeginAttempt(attempt=attempt, nonce=f"n{attempt}", writer="w", base=base), 1.0
        )
        assert begun.accepted

    def says(self, *lines: str) -> None:
        self._store.append(
            self._pk, {CONSOLE: (self._seq, list(lines))}, 2.0, attempt=self._attempt, nonce=f"n{self._attempt}", writer="w"
        )
        self._seq += len(lines)

    def files(self, *names: str, run: str = "r") -> dict[str, Any]:
        found = self._ask(FILES, n=list(names) or None, r=run)["project"]["run"]
        nodes = {edge["node"]["name"]: edge["node"] for edge in found["files"]["edges"]}
        assert names or found["fileCount"] == len(nodes)
        return nodes

    def download(self, node: dict[str, Any]) -> bytes:
        answer = self._client.get(node["directUrl"], auth=None)
        assert answer.status_code == 200, answer.text
        return answer.content


@pytest.fixture
def run(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> Iterator[Printing]:
    monkeypatch.setattr(ctx.auth, "check_request", lambda _request: User("admin", "local", admin=True))
    with TestClient(create_app(ctx)) as client:
        yield Printing(ctx, client)


def test_what_was_printed_is_a_file(run: Printing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that it is listed, found by name and read as it was printed, and that size and digest are those of what an address
    gives, also when more is printed meanwhile and however many portions it is read in."""
    monkeypatch.setattr(console_file, "_AT_ONCE", 2)
    assert run.files() == {}
    assert run.files(CONSOLE)[CONSOLE]["md5"] == "0"
    run.says(AT + "hello", f"ERROR {AT}[rank1] oops", "no time at all", AT + "\u00fcber\n")
    node = run.files()[CONSOLE]
    expected = "hello\n[rank1] oops\nno time at all\n\u00fcber\n".encode()
    run.says(AT + "later")
    assert run.download(node) == expected
    assert (node["sizeBytes"], node["mimetype"]) == (len(expected), "text/plain")
    assert node["md5"] == b64encode(hashlib.md5(expected).digest()).decode()
    assert run.download(run.files(CONSOLE)[CONSOLE]) == expected + b"later\n"


def test_it_is_cut_where_attempts_are(run: Printing) -> None:
    """Proves that what a lost stretch printed is in the archived attempt's file alone."""
    run.says(AT + "one", AT + "two", AT + "lost")
    run.begin(2, Watermark(attempt=1, counts={CONSOLE: {"w": 2}}, step=-1))
    run.says(AT + "three")
    assert run.download(run.files()[CONSOLE]) == b"one\ntwo\nthree\n"
    assert run.download(run.files(run="r:1")[CONSOLE]) == b"one\ntwo\nlost\n"


def test_an_uploaded_one_counts(run: Printing, ctx: AppContext) -> None:
    """Proves that a file of that name (W&B's client uploads one), and its deletion, are not undone."""
    run.says(AT + "printed")
    found = ctx.store.get_run("local", "p", "r")
    assert found is not None
    with TestClient(create_app(ctx)) as client:
        assert client.put(f"/files/local/p/r/content/{CONSOLE}", content=b"uploaded").status_code == 200
        assert run.download(run.files()[CONSOLE]) == b"uploaded"
        gone = "mutation($f: [ID!]!) { deleteFiles(input: {files: $f}) { success } }"
        ids = [run.files()[CONSOLE]["id"]]
        answer = client.post("/graphql", content=json.dumps({"query": gone, "variables": {"f": ids}}))
        assert answer.json()["data"]["deleteFiles"]["success"] is True
    assert run.files() == {}
    assert run.files(CONSOLE)[CONSOLE]["md5"] == "0"
