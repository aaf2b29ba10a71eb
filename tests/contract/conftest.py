"""The real wandb SDK, in processes of its own, against a real server of ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that takes three seconds of silence for death: the tests' SDKs speak every second."""
    with Server(tmp_path / "server", "--silence-timeout", "3") as process:
        yield process


class Sdk:
    """Runs scripts that use wandb, each in a process group of its own, so that killing one kills its wandb-core too."""

    def __init__(self, server: Any, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._env = {
            **os.environ,
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": server.key,
            "WANDB_DIR": str(folder),
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_DATA_DIR": str(folder / "staging"),
            "WANDB_CONFIG_DIR": str(folder / "config"),
            "WANDB_SILENT": "true",
            "PYTHONUNBUFFERED": "1",
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, script: str) -> subprocess.Popen[bytes]:
        log = (self._folder / f"{len(self._processes)}.log").open("w+b")
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=self._folder, env=self._env, stdout=log, stderr=log, start_new_session=True
        )
        self._processes.append(process)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        return (self._folder / f"{self._processes.index(process)}.log").read_text(errors="replace")

    def run(self, script: str, timeout: float = 200) -> str:
        """Its output, once it ended with 0."""
        process = self.start(script)
        assert process.wait(timeout) == 0, self.log(process)
        return self.log(process)

    def read(self, expression: str) -> Any:
        """The value of an expression over `api`, a wandb.Api()."""
        script = f"import json, wandb; api = wandb.Api(); print('VALUE', json.dumps({expression}))"
        line = next(line for line in self.run(script).splitlines() if line.startswith("VALUE "))
        return json.loads(line.removeprefix("VALUE "))

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the script and everything it started, as a lost machine."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def close(self) -> None:
        for process in self._processes:
            try:
                self.kill(process)
            except ProcessLookupError:
                process.wait(10)


@pytest.fixture
def sdk(server: Any, tmp_path: Path) -> Iterator[Sdk]:
    user = Sdk(server, tmp_path / "sdk")
    yield user
    user.close()
