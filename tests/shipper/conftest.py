"""A loopback server for the shipper's tests: what docs/architecture.md, "One wire", asks of a server, with faults on demand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from wbdist.run.journal import JournalHeader, JournalWriter, journal_name
from wbdist.run.shipper import client
from wbdist.run.shipper.control import Request, call, instance_lock_path, socket_path

ROOT = Path(__file__).resolve().parents[2]

STREAMS = ("wandb-history.jsonl", "wandb-events.jsonl", "output.log")


class LoopbackServer:
    """Keeps lines by (attempt, writer, stream) and answers gaps, duplicates and fenced attempts as ours does.

    `fault` is asked before each request is handled, with (path, body): it may return an HTTP status, "drop" (close
    without an answer), "drop-after" (handle, then close without an answer), or None.
    """

    def __init__(self, *, ours: bool = True) -> None:
        self.ours = ours
        self.lock = threading.Lock()
        self.lines: dict[tuple[int, str, str], list[str]] = {}
        self.rivals: dict[str, dict[tuple[int, str, str], list[str]]] = {}
        """nonce -> what came under it for the attempt that another nonce holds."""
        self.attempt = 0
        self.nonce = ""
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.marks: list[str] = []
        """In order: "begin N", "preempting", "complete CODE", "ended CAUSE"."""
        self.archived_ends: dict[int, str] = {}
        """attempt -> how it ended, as told after it was fenced."""
        self.requests: list[tuple[str, Any]] = []
        self.offsets: dict[int, str] = {}
        """Foreign mode: line number -> history line."""
        self.keys: set[str] = set()
        self.fault: Callable[[str, Any], int | str | None] = lambda path, body: None
        self._http: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        """Listens, on the same port as before if it did before."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                server.keys.add(self.headers.get("Authorization", ""))
                fault = server.fault(self.path, body)
                if fault == "drop":
                    self.close_connection = True
                    return
                headers = {}
                if isinstance(fault, int):
                    status, answer = fault, {"error": f"fault {fault}"}
                    if fault == 429:
                        headers["Retry-After"] = "0.3"
                else:
                    with server.lock:
                        server.requests.append((self.path, body))
                        status, answer = server.graphql(body) if self.path == "/graphql" else server.stream(body)
                if fault == "stall":  # says nothing, and keeps the connection, until the client hangs up
                    self.connection.settimeout(30)
                    self.rfile.read(1)
                if fault in {"drop-after", "stall"}:
                    self.close_connection = True
                    return
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A killed client: not worth a traceback."""

        self._http = Server(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def history(self, attempt: int = 1, writer: str = "rank0") -> list[dict[str, Any]]:
        with self.lock:
            return [json.loads(line) for line in self.lines.get((attempt, writer, STREAMS[0]), [])]

    def graphql(self, body: Any) -> tuple[int, Any]:
        name, variables = body["operationName"], body["variables"]
        if name == "ServerFeaturesQuery":
            features = [{"name": "WBDIST_ATTEMPTS", "isEnabled": True}] if self.ours else []
            return 200, {"data": {"serverInfo": {"features": features}}}
        if "upsertBucket" in body["query"]:
            self.facts.update({key: value for key, value in variables.items() if key != "config"})
            if "config" in variables:
                self.config = json.loads(variables["config"])
            project = {
                "id": "P",
                "name": variables["project"],
                "entity": {"id": "E", "name": variables.get("entity") or "team"},
            }
            count = 0 if self.ours else len(self.offsets)
            bucket = {"id": "S", "name": variables["name"], "displayName": "d", "historyLineCount": count, "project": project}
            return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if name == "BeginAttempt":
            wanted = variables["input"]
            accepted = wanted["attempt"] > self.attempt or (wanted["attempt"], wanted["nonce"]) == (self.attempt, self.nonce)
            if accepted and wanted["attempt"] > self.attempt:
                self.attempt, self.nonce = wanted["attempt"], wanted["nonce"]
                self.marks.append(f"begin {self.attempt}")
            expected: dict[str, dict[str, int]] = {}
            for (attempt, writer, stream), lines in self.lines.items():
                if attempt == self.attempt:
                    expected.setdefault(stream, {})[writer] = len(lines)
            return 200, {
                "data": {"beginAttempt": {"attempt": self.attempt, "accepted": accepted, "next": expected, "lines": {}}}
            }
        return 400, {"errors": [{"message": f"unknown operation {name}"}]}

    def stream(self, body: Any) -> tuple[int, Any]:
        if not self.ours:
            return self.foreign_stream(body)
        stamp = body["wbdist"]
        attempt, writer = stamp["attempt"], stamp["writer"]
        fenced = (attempt, stamp["nonce"]) != (self.attempt, self.nonce)
        rival = attempt == self.attempt and stamp["nonce"] != self.nonce
        kept = self.rivals.setdefault(stamp["nonce"], {}) if rival else self.lines
        expected = {stream: len(kept.get((attempt, writer, stream), [])) for stream in STREAMS}
        for stream in STREAMS:
            if stream in body.get("files", {}) and stamp["seq"][stream] > expected[stream]:
                return 409, {"error": "gap", "wbdist": {"code": "gap", "next": expected}}
        for stream in STREAMS:
            if stream in body.get("files", {}):
                stored = kept.setdefault((attempt, writer, stream), [])
                stored.extend(body["files"][stream]["content"][len(stored) - stamp["seq"][stream] :])
                expected[stream] = len(stored)
        if fenced:
            if "ended" in stamp:
                self.archived_ends[attempt] = stamp["ended"]["cause"]
            return 409, {"error": "fenced", "wbdist": {"code": "fenced", "attempt": self.attempt, "next": expected}}
        if "wandb-summary.json" in body.get("files", {}):
            self.summary = json.loads(body["files"]["wandb-summary.json"]["content"][-1])
        self.mark(body)
        return 200, {"wbdist": {"next": expected}}

    def foreign_stream(self, body: Any) -> tuple[int, Any]:
        chunk = body.get("files", {}).get(STREAMS[0])
        if chunk is not None:
            self.offsets.update(enumerate(chunk["content"], chunk["offset"]))
        self.mark(body)
        return 200, {}

    def mark(self, body: Any) -> None:
        if body.get("preempting"):
            self.marks.append("preempting")
        if body.get("complete"):
            self.marks.append(f"complete {body['exitcode']}")
        if ended := body.get("wbdist", {}).get("ended"):
            self.marks.append(f"ended {ended['cause']}")


@pytest.fixture
def loopback() -> Iterator[LoopbackServer]:
    server = LoopbackServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def foreign() -> Iterator[LoopbackServer]:
    server = LoopbackServer(ours=False)
    server.start()
    yield server
    server.stop()


class Wandb:
    """A `wandb` directory with journals in it, and the shippers started for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writers: list[JournalWriter] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        root.mkdir()

    def journal(
        self, url: str = "", *, run_id: str = "r1", attempt: int = 1, writer: str = "rank0", place: str = "", **facts: Any
    ) -> JournalWriter:
        directory = self.root / (place or f"run-{run_id}-{attempt}")
        directory.mkdir(exist_ok=True)
        values: dict[str, Any] = {"nonce": f"n{attempt}", "created": time.time(), "online": bool(url), "base_url": url, **facts}
        header = JournalHeader(run_id=run_id, project="p", entity="", attempt=attempt, writer=writer, **values)
        made = JournalWriter.create(directory / journal_name(writer, attempt), header)
        self.writers.append(made)
        return made

    def rows(self, writer: JournalWriter, first: int, last: int) -> None:
        for step in range(first, last):
            writer.append_row({"i": step, "loss": 1 / (step + 1)}, step=step, commit=True, time=time.time())

    def shipper(self, *options: str, **popen: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "wbdist.run.shipper", "--root", str(self.root), "--linger", "0.2", *options]
        popen.setdefault("start_new_session", True)
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": "k" * 40}, **popen)
        self.processes.append(process)
        return process

    def pid(self) -> int:
        """Of the shipper that serves, 0 when none does."""
        try:
            return call(self.root, Request("ping"), 5.0).pid
        except OSError:
            return 0

    def log(self) -> str:
        path = self.root / "logs" / "shipper.log"
        return path.read_text() if path.exists() else ""

    def clean(self) -> None:
        for writer in self.writers:
            writer.close(0)
        if pid := self.pid():
            os.kill(pid, signal.SIGKILL)
        started = client._started.pop(self.root, None)
        for process in [*self.processes, *([started] if started else [])]:
            process.kill()
            process.wait(10)
        socket_path(self.root).unlink(missing_ok=True)
        instance_lock_path(self.root).unlink(missing_ok=True)


@pytest.fixture
def wandb(tmp_path: Path) -> Iterator[Wandb]:
    made = Wandb(tmp_path / "wandb")
    yield made
    made.clean()
