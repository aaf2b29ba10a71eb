"""The part of W&B's server that hands the trials of a sweep to its agents, in front of a server of ours that keeps the runs."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from wbdist.protocol import edits

_KEPT = ("Authorization", "Content-Type", "Content-Encoding", "Content-Range")


class SweepServer:
    """W&B's answers to `wandb agent ENTITY/PROJECT/SWEEP`, which starts the trials one after the other and then ends.

    As W&B's, it makes a trial's run known before the agent hears of it.
    """

    def __init__(
        self, behind: Any, project: str, sweep: str, command: list[str], trials: list[tuple[str, dict[str, Any]]]
    ) -> None:
        """`trials`: run id and parameters; one that comes twice is requeued."""
        self.sweeps_of_runs: set[tuple[str, str]] = set()
        """(run id, sweep) of the upserts that name a sweep."""
        self._behind, self._project, self._sweep = behind, project, sweep
        self._command = command
        self._waiting = list(trials)
        self._running: str | None = None
        sweeps = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name: self.headers[name] for name in _KEPT if name in self.headers}
                status, answer = sweeps.answer(self.command, self.path, body, headers)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = _answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if path == "/graphql":
            sent = json.loads(body)
            query, variables = sent["query"], sent.get("variables") or {}
            if variables.get("sweep") and "upsertBucket" in query:
                self.sweeps_of_runs.add((variables["name"], variables["sweep"]))
            if (own := self._own(query, variables)) is not None:
                return 200, json.dumps({"data": own}).encode()
        request = urllib.request.Request(self._behind.url + path, body or None, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as found:
                return 200, found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _own(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The agent's operations have no names of their own."""
        if "sweep(sweepName:" in query:
            config = {"program": "train.py", "command": self._command, "method": "grid", "parameters": {}}
            sweep = {"id": self._sweep, "name": self._sweep, "state": "RUNNING", "config": json.dumps(config)}
            return {"project": {"sweep": {**sweep, "runs": {"edges": []}}}}
        if "createAgent(" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "agentHeartbeat(" in query:
            alive = json.loads(variables.get("runState") or "{}")
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self._next(alive))}}
        return None

    def _next(self, alive: dict[str, bool]) -> list[dict[str, Any]]:
        if self._running is not None and alive.get(self._running):
            return []
        if not self._waiting:
            return [{"type": "exit"}]
        self._running, parameters = self._waiting.pop(0)
        self._behind.ask(edits.create_run("", self._project, self._running, "pending"))
        args = {name: {"value": value} for name, value in parameters.items()}
        return [{"type": "run", "run_id": self._running, "args": args, "program": "train.py"}]
