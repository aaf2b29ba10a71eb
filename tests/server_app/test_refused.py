"""What the server refuses stands in its log: of whom, what and why, without keys and without end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
from starlette.testclient import TestClient

from wbdist.server.app import create_app
from wbdist.server.auth import User
from wbdist.server.context import AppContext
from wbdist.server.refused import LINES, WINDOW, RefusalLog

STREAM = "/files/local/p/r/file_stream"
FILE = "/files/local/p/r/content"
SECRET = "k" * 40


@pytest.fixture
def client(ctx: AppContext) -> Iterator[TestClient]:
    small = replace(ctx, settings=msgspec.structs.replace(ctx.settings, max_stream_bytes=1000, max_file_bytes=1000))
    with TestClient(create_app(small), raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def as_admin(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctx.auth, "check_request", lambda _request: User("admin", "local", admin=True))


@pytest.fixture
def as_eve(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    eve = User("eve", "eve", entities=frozenset({"eve", "local"}))
    monkeypatch.setattr(ctx.auth, "check_request", lambda _request: eve)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "wbdist.server.refused"]


@pytest.mark.usefixtures("as_admin")
@pytest.mark.parametrize(
    ("method", "path", "content", "said"),
    [
        ("PUT", f"{FILE}/a/%2e%2e/%2e%2e/x", b"", "400 'a/../../x' cannot name a run's file"),
        ("POST", STREAM, b"x" * 1001, "413 the body is larger than the 1000 bytes"),
        ("POST", STREAM, b"{", "400 "),
        ("POST", "/graphql", b'{"query": 1', "400 not a GraphQL request"),
        ("POST", STREAM, b'{"files": {"wandb-history.jsonl": {"offset": 0, "content": ["\\n[]"]}}}', "400 "),
    ],
)
def test_what_is_senseless(
    client: TestClient, caplog: pytest.LogCaptureFixture, method: str, path: str, content: bytes, said: str
) -> None:
    """Proves that a path that leads out, an oversized body and malformed JSON are each one line that says why."""
    assert client.request(method, path, content=content).status_code in {400, 413}
    (line,) = lines(caplog)
    assert line.startswith(f"refused to testclient: {method} {path}: {said}")
    assert line.isprintable()


def test_a_wrong_key(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Proves that a wrong key, and an address whose signature is, are said, and neither is."""
    assert client.post("/graphql", auth=("api", SECRET), json={"query": "{ viewer { id } }"}).status_code == 401
    assert client.get(f"{FILE}/a.txt?method=GET&until=9&signature={SECRET}").status_code == 403
    assert [line.split(": ")[2][:3] for line in lines(caplog)] == ["401", "403"]
    assert SECRET not in caplog.text


@pytest.mark.usefixtures("as_eve")
def test_projects_of_others(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Proves that writing to a project of others is said, and reading one, though that is answered as if there were none."""
    assert client.post(STREAM, content=b"{}").status_code == 403
    assert client.get(f"{FILE}/a.txt").status_code == 404
    read = client.post("/graphql", json={"query": '{ project(name: "p", entityName: "local") { id } }'})
    assert read.json() == {"data": {"project": None}}
    write, file, project = lines(caplog)
    assert "403 you (eve) may not write to project local/p" in write
    assert "404 the run does not exist, or is not for you to see" in file
    assert project == "refused to eve: read local/p: not a project of his, nor a public one"


def test_the_usual_is_not_said(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Proves that good requests and the answer that there is no telemetry leave no line."""
    assert client.get("/healthz").status_code == 200
    assert client.post("/sdk/otel/v1/logs").status_code == 404
    assert lines(caplog) == []


def test_a_flood_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Proves that one who asks again and again fills no disk and hides nobody else, and that what was left out is counted."""
    now = 0.0
    log = RefusalLog(lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(LINES + 30):
            log.note("10.0.0.1", "POST /graphql", "401 no\nkey")
        log.note("10.0.0.2", "GET /x", "404")
        assert len(lines(caplog)) == LINES + 1
        now = WINDOW
        log.note("10.0.0.1", "POST /graphql", "401")
    assert lines(caplog)[0] == r"refused to 10.0.0.1: POST /graphql: 401 no\nkey"
    assert lines(caplog)[-2:] == [
        "10.0.0.1: 30 more requests of that minute were refused",
        "refused to 10.0.0.1: POST /graphql: 401",
    ]
