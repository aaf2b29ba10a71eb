"""`wbdist launch` as a process, and everything it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from support.waiting import until

SCRIPT = Path(__file__).parents[1] / "launch" / "rank_script.py"


class Launched:
    """One `wbdist launch` and its family, known by a mark in their environment."""

    def __init__(self, cwd: Path, arguments: list[str], number: int, **kwargs: Any) -> None:
        self.cwd = cwd
        self.mark = f"{os.getpid()}-{number}-{time.monotonic_ns()}"
        self._log = cwd / f"launcher-{number}.log"
        # The launcher respects nohup; a suite that was started under it must not make it deaf to SIGHUP.
        kwargs.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wbdist", "launch", *arguments],
                cwd=cwd,
                env={**os.environ, "WBDIST_TEST_MARK": self.mark},
                stdout=log,
                stderr=log,
                **kwargs,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def family(self) -> list[int]:
        """pids of all processes alive that carry the mark, the launcher included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("WBDIST_TEST_MARK") == self.mark:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
        return found

    def pids(self, ranks: int = 2, restart: int = 0) -> list[int]:
        """By rank, once all are ready."""
        files = [self.cwd / f"{rank}.{restart}.pid" for rank in range(ranks)]
        until(lambda: all(file.exists() for file in files) or self.process.poll() is not None, "the ranks to be ready")
        assert all(file.exists() for file in files), self.output
        return [int(file.read_text()) for file in files]

    def wait(self, timeout: float = 90.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher did not end within {timeout} s:\n{self.output}") from None

    def end(self) -> None:
        for pid in self.family():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait(10)


Launch = Callable[..., Launched]
