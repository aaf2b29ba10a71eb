"""A real server process, a real store in this process, and a client that speaks W&B's wire."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import requests

from wbdist.server.auth import Auth
from wbdist.server.context import AppContext
from wbdist.server.files import FileStore
from wbdist.server.keys import open_key_ring
from wbdist.server.settings import ServerSettings
from wbdist.server.store import open_store

ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 90.0) -> Any:
    """The first true value of `condition`; fails naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {timeout} s")
        time.sleep(0.01)


class ServerProcess:
    """`wbdist server` as users start it. Use as a context manager."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self._arguments = arguments
        self._port_file = data_dir.with_suffix(".url")
        self.log = data_dir.with_suffix(".log")
        self.start()

    def start(self, port: int = 0) -> None:
        """Starts it (again) and waits until it listens."""
        self._port_file.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "wbdist.cli.server",
            "--data-dir",
            self.data_dir,
            "--port",
            port,
            "--port-file",
            self._port_file,
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(part) for part in [*command, *self._arguments]], cwd=ROOT, stdout=log, stderr=log
            )
        wait_for(lambda: self._port_file.exists() or self.process.poll() is not None, "start of the server")
        assert self.process.poll() is None, self.log.read_text()
        self.url = self._port_file.read_text().strip()
        self.port = int(self.url.rpartition(":")[2])
        self.key = (self.data_dir / "admin.key").read_text().strip()

    def kill(self) -> None:
        """SIGKILL, as a lost machine."""
        self.process.kill()
        self.process.wait(10)

    def post(self, path: str, **options: Any) -> requests.Response:
        return requests.post(self.url + path, auth=("api", self.key), timeout=10, **options)

    def graphql(self, query: str, **variables: Any) -> Any:
        """The `data` of the answer; fails on an error."""
        answer = self.post("/graphql", json={"query": query, "variables": variables})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert not psutil.Process(self.process.pid).children(), "the server left children"
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for a module's tests: they use projects of their own."""
    os.environ.pop("WBDIST_DATA_DIR", None)
    with ServerProcess(tmp_path_factory.mktemp("server") / "data") as process:
        yield process


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ctx(tmp_path: Path, clock: Clock) -> Iterator[AppContext]:
    """The app's context in this process, over a real store and a clock of the test's own."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    settings = ServerSettings()
    auth = Auth(open_key_ring(data_dir, settings.entity), settings, clock)
    store = open_store(f"sqlite:///{data_dir / 'wbdist.db'}")
    yield AppContext(store, auth, FileStore(data_dir / "files"), settings, clock, "http://127.0.0.1:1")
    store.close()
