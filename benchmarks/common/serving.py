"""wbdist's server, as a user starts it, for the benchmarks that measure through it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Listens on loopback when it has been made, with its data below `directory`. Use as a context manager.

    Raises SystemExit with the server's log when it does not come up within a minute.
    """

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        log, port_file = directory / "server.log", directory / "url"
        command = ["-m", "wbdist", "server", "--data-dir", str(self.data), "--port", "0", "--port-file", str(port_file)]
        with log.open("wb") as said:
            self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=said, stderr=said)
        deadline = time.monotonic() + 60
        while not port_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise SystemExit(f"wbdist server did not start within 60 s:\n{log.read_text()}")
            time.sleep(0.02)
        self.url = port_file.read_text().strip()
        self.key = (self.data / "admin.key").read_text().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.send_signal(signal.SIGCONT)  # a benchmark may have stopped it
        self.process.terminate()
        self.process.wait(30)
