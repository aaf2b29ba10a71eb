"""`wbdist server` on loopback, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import psutil
import requests
from support.waiting import until

from wbdist.protocol.operations import Operation


class Server:
    """On one data directory; killed and started at will."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        self.environment: dict[str, str] = {}
        """Variables on top of ours."""
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.url = self.key = ""
        self._arguments = arguments

    def start(self, port: int | None = None) -> None:
        """Waits until it listens: on its old port, or on `port` (0: any)."""
        moves = port is not None or not self.url
        port = self.port if port is None else port
        port_file = self.data_dir.with_name(f"{self.data_dir.name}.url")
        port_file.unlink(missing_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        place = ("--data-dir", str(self.data_dir), "--port", str(port), "--port-file", str(port_file))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wbdist", "server", *place, *self._arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        until(lambda: port_file.exists() or self.ended(), "the server to listen")
        assert port_file.exists(), self.log.read_text()
        old, self.url = self.url, port_file.read_text().strip()
        assert moves or self.url == old, f"the server came back at {self.url}, not {old}"
        self.port = int(self.url.rpartition(":")[2])
        self.key = (self.data_dir / "admin.key").read_text().strip()

    def ended(self) -> bool:
        """Whether there is no process, or none any more."""
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL, as a lost machine."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> None:
        """SIGTERM, which it must heed, leaving no children."""
        if self.process is None or self.ended():
            return
        children = psutil.Process(self.process.pid).children()
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        assert not children, f"the server had children: {children}"

    def post(self, path: str, **options: Any) -> requests.Response:
        return requests.post(self.url + path, auth=("api", self.key), timeout=10, **options)

    def graphql(self, query: str, **variables: Any) -> Any:
        """The `data` of the answer; fails on an error."""
        answer = self.post("/graphql", json={"query": query, "variables": variables})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def ask(self, operation: Operation) -> Any:
        """The `data` of the answer to one of the client's operations; fails on a refusal."""
        answer = self.post("/graphql", data=operation.body())
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
