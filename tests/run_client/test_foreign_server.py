"""Going on with a run on a server that knows no attempts: our own one behind a proxy that hides and refuses what is ours."""

from __future__ import annotations

import json
import logging
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import wbdist
from wbdist.run import backend
from wbdist.run.shipper.oneshot import ship
from wbdist.run.shipper.remote import Remote


class PlainServer:
    """What W&B's server understands of what our client says, and nothing more."""

    def __init__(self, behind: str) -> None:
        self.operations: list[str] = []
        self.refused: set[str] = set()
        """Operations it does not offer."""
        plain = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = plain.answer(behind, self.path, body, self.headers["Authorization"])
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, behind: str, path: str, body: bytes, credentials: str) -> tuple[int, bytes]:
        sent = json.loads(body or b"{}")
        if path == "/graphql":
            name = sent["operationName"]
            self.operations.append(name)
            if name in self.refused or re.search(r"beginAttempt|position\(|attempts", sent["query"]):
                return 400, json.dumps({"errors": [{"message": f"Cannot query {name}"}]}).encode()
            # Ours knows by the operation's name that attempts govern the run; W&B's does not look at it.
            sent["query"] = sent["query"].replace("UpsertAttemptedRun", "UpsertBucket")
            sent["operationName"] = name.replace("UpsertAttemptedRun", "UpsertBucket")
        else:
            sent.pop("wbdist", None)
        headers = {"Content-Type": "application/json", "Authorization": credentials}
        request = urllib.request.Request(behind + path, json.dumps(sent).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as found:
                data = found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        return 200, data.replace(b"WBDIST_ATTEMPTS", b"SOMETHING_ELSE")

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def plain(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainServer]:
    url = backend.embedded_url(embedded, 20)
    server = PlainServer(url)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", (embedded / "admin.key").read_text().strip())
    yield server
    server.stop()


def rows_of(embedded: Path, run_id: str) -> list[tuple[int, Any]]:
    run = wbdist.Api({"base_url": str(backend.running(embedded))}).run(f"p/{run_id}")
    return [(row["_step"], row["i"]) for row in run.scan_history()]


def log(first: int, last: int, **arguments: Any) -> wbdist.Run:
    with wbdist.init(project="p", settings={"console": "off"}, **arguments) as run:
        for i in range(first, last):
            run.log({"i": i})
    return run


def test_resume_by_wandbs_rule(plain: PlainServer, embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a run goes on behind the server's last step, takes over config and summary, that replayed steps are skipped,
    and that the run says that W&B's rule applied; must, never and a missing run give the same errors as on our own server."""
    first = log(0, 5, id="x", config={"a": 1})
    assert first.step == 5
    with pytest.raises(wbdist.UsageError, match="'gone' does not exist"):
        wbdist.init(project="p", id="gone", resume="must")
    with pytest.raises(wbdist.UsageError, match="never"):
        wbdist.init(project="p", id="x", resume="never")
    capsys.readouterr()
    with wbdist.init(project="p", id="x", resume="must", config={"b": 2}) as run:
        assert (run.step, run.resumed, run.summary["i"], run.config.as_dict()) == (5, True, 4, {"a": 1, "b": 2})
        assert "knows no attempts: run x goes on by W&B's rules" in capsys.readouterr().err
        for i in range(3, 8):
            run.log({"i": i}, step=i)
    assert rows_of(embedded, "x") == [(i, i) for i in range(8)]
    assert plain.operations.index("RunResumeStatus") < len(plain.operations)
    assert "BeginAttempt" not in plain.operations


def test_rewind_where_it_is_offered(plain: PlainServer, embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a rewind is the server's own where it offers one; else what is logged again is skipped; the run says it."""
    log(0, 8, id="x")
    run = log(100, 102, resume_from="x?_step=3")
    assert run.starting_step == 4
    assert "by W&B's own rewind to step 3" in capsys.readouterr().err
    assert rows_of(embedded, "x") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 100), (5, 101)]
    plain.refused.add("RewindRun")
    with wbdist.init(project="p", resume_from="x?_step=1", settings={"console": "off"}) as run:
        assert run.starting_step == 6
        assert "without the rewind to step 1" in capsys.readouterr().err
        for i in range(2, 8):
            run.log({"i": 200 + i}, step=i)
    assert rows_of(embedded, "x") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 100), (5, 101), (6, 206), (7, 207)]


def test_fork(plain: PlainServer, embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a fork travels as W&B's branch point, in the first word of the new run."""
    log(0, 8, id="x", config={"a": 1})
    run = log(50, 52, id="y", fork_from="x?_step=3")
    assert (run.starting_step, run.resumed, run.config.as_dict()) == (4, False, {"a": 1})
    assert "by W&B's own fork" in capsys.readouterr().err
    assert rows_of(embedded, "y") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 50), (5, 51)]
    assert rows_of(embedded, "x") == [(i, i) for i in range(8)]
    del plain


def test_alerts_go_by_wandbs_mutation(plain: PlainServer, embedded: Path) -> None:
    """Proves that a server without attempts is told of each alert once, also when the journal is sent again, and that one which
    knows no alerts gets the rows all the same."""
    with wbdist.init(project="p", id="x", settings={"console": "off"}) as run:
        run.log({"i": 0})
        run.alert("first", "text", level="ERROR")
        run.alert("second", "text")
    assert run.journal_path is not None
    found = wbdist.Api({"base_url": str(backend.running(embedded))}).run("p/x")
    assert [(alert.title, alert.level) for alert in found.alerts()] == [("first", "ERROR"), ("second", "INFO")]
    said = plain.operations.count("NotifyScriptableRunAlert")
    key = (embedded / "admin.key").read_text().strip()
    (again,) = ship([run.journal_path], lambda _: Remote(plain.url, key), 30, logging.getLogger("test"))
    assert again.outcome != "failed"
    assert (said, plain.operations.count("NotifyScriptableRunAlert")) == (2, 2)
    plain.refused.add("NotifyScriptableRunAlert")
    with wbdist.init(project="p", id="y", settings={"console": "off"}) as run:
        run.alert("first", "text")
        run.log({"i": 0})
    assert rows_of(embedded, "y") == [(0, 0)]
