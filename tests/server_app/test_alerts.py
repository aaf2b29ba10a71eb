"""Alerts: taken by W&B's mutation and as lines of our own client, cut as rows are, shown on the page and in the read API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from wbdist.core.position import ALERTS, HISTORY, Watermark
from wbdist.protocol import file_stream, operations, reads
from wbdist.protocol.attempts import BeginAttempt, StreamStamp
from wbdist.protocol.file_stream import FileChunk, StreamRequest
from wbdist.server.app import create_app
from wbdist.server.context import AppContext


class Wire:
    """The app in this process, and one run on it."""

    def __init__(self, ctx: AppContext, key: str) -> None:
        self.http = TestClient(create_app(ctx), base_url="http://127.0.0.1:1", headers={"Authorization": f"Bearer {key}"})
        self.ask(operations.upsert_run(project="p", entity="local", run_id="r"))

    def ask(self, operation: operations.Operation) -> Any:
        answer = self.http.post("/graphql", content=operation.body())
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def notify(self, title: str, wait: float, level: str = "INFO") -> bool:
        sent = operations.notify_alert(("local", "p", "r"), title, "text", level, wait)
        return bool(self.ask(sent)["notifyScriptableRunAlert"]["success"])

    def begin(self, attempt: int, base: Watermark | None = None, at_step: int | None = None) -> None:
        begin = BeginAttempt(attempt, f"n{attempt}", "w", base, at_step=at_step)
        assert self.ask(operations.begin_attempt("local", "p", "r", begin))["beginAttempt"]["accepted"]

    def send(self, attempt: int, stream: str, seq: int, *lines: dict[str, Any]) -> int:
        stamp = StreamStamp(attempt, f"n{attempt}", "w", {stream: seq})
        request = StreamRequest(files={stream: FileChunk([json.dumps(line) for line in lines])}, wbdist=stamp)
        return self.http.post(file_stream.path("local", "p", "r"), content=file_stream.encode_request(request)).status_code

    def shown(self, run: str = "r") -> list[str]:
        return [alert.title for alert in reads.read_alerts(self.ask(reads.alerts("local", "p", run)))]


@pytest.fixture
def wire(ctx: AppContext, tmp_path: Path) -> Wire:
    return Wire(ctx, (tmp_path / "data" / "admin.key").read_text().strip())


def test_one_title_is_taken_again_after_its_wait(wire: Wire, clock: Any) -> None:
    """Proves W&B's rule per title, of which a repeated request is a case; that bad ones are refused; all is on the page."""
    assert wire.notify("a", wait=5, level="WARN")
    clock.now += 4.9
    assert not wire.notify("a", wait=5)
    assert wire.notify("b", wait=5)
    clock.now += 0.1
    assert wire.notify("a", wait=5, level="ERROR")
    assert wire.shown() == ["a", "b", "a"]
    page = wire.http.get("/api/ui/local/p/runs/r").json()["run"]["alerts"]
    assert [(alert["title"], alert["level"], alert["step"]) for alert in page] == [
        ("a", "WARN", None),
        ("b", "INFO", None),
        ("a", "ERROR", None),
    ]
    for wrong in ({"severity": "LOUD"}, {"waitDuration": "1m"}, {"waitDuration": -1}, {"title": ""}, {"runName": "nosuch"}):
        operation = operations.notify_alert(("local", "p", "r"), "t", "x", "INFO", 1)
        operation.variables.update(wrong)
        assert wire.http.post("/graphql", content=operation.body()).status_code in {400, 404}
    assert len(wire.shown()) == 3


def test_alerts_belong_to_attempts(wire: Wire) -> None:
    """Proves that a repeated line adds nothing, that a watermark and a step cut alerts as rows, that what is cut is readable,
    and that a superseded writer's go to the archive."""
    wire.begin(1)
    rows = [{"_step": step, "x": step} for step in range(10)]
    alerts = [{"title": f"at {step}", "text": "", "level": "WARN", "_step": step, "_timestamp": step} for step in (2, 5, 8)]
    assert wire.send(1, HISTORY, 0, *rows) == 200
    for _ in range(2):
        assert wire.send(1, ALERTS, 0, *alerts[:2]) == 200
    assert wire.send(1, ALERTS, 2, alerts[2]) == 200
    assert wire.shown() == ["at 2", "at 5", "at 8"]
    wire.begin(2, Watermark(1, {HISTORY: {"w": 6}, ALERTS: {"w": 2}}, 5))
    assert wire.shown() == ["at 2", "at 5"]
    assert wire.shown("r:1") == ["at 2", "at 5", "at 8"]
    assert wire.send(1, ALERTS, 3, {**alerts[2], "title": "late"}) == 409
    assert wire.shown() == ["at 2", "at 5"]
    assert wire.shown("r:1") == ["at 2", "at 5", "at 8", "late"]
    wire.begin(3, at_step=3)
    assert wire.shown() == ["at 2"]
    assert wire.notify("from W&B's client", wait=60)
    assert wire.shown() == ["at 2", "from W&B's client"]
