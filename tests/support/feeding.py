"""Ranks as real processes, and what they left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from support.journals import rows_of
from support.waiting import until

from wbdist.errors import JournalCorruptError
from wbdist.run.journal import JournalReader, find_journals

PROGRAMS = Path(__file__).parents[1] / "distributed" / "programs"
REPOSITORY = Path(__file__).parents[2]


class Ranks:
    """The processes of one trial in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "keys").mkdir(parents=True)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, size: int, **orders: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{PROGRAMS}"}
        for rank in range(size):
            command = [sys.executable, str(PROGRAMS / "rank.py"), str(self.root), str(rank), str(size), json.dumps(orders)]
            output = (self.root / f"rank{rank}.out").open("w")
            errors = (self.root / f"rank{rank}.err").open("w")
            self.processes.append(subprocess.Popen(command, stdout=output, stderr=errors, env=environment, text=True))

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [
            line for rank in range(len(self.processes)) for line in (self.root / f"rank{rank}.out").read_text().splitlines()
        ]
        return [event for event in map(json.loads, filter(lambda line: line.endswith("}"), lines)) if event["event"] == name]

    def until(self, name: str, count: int, seconds: float = 90) -> list[dict[str, Any]]:
        until(lambda: len(self.events(name)) >= count, f"{count} x {name}: {self.errors()}", seconds)
        return self.events(name)

    def open_gate(self) -> None:
        (self.root / "open").touch()

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes by rank."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def errors(self) -> str:
        return "".join((self.root / f"rank{rank}.err").read_text() for rank in range(len(self.processes)))

    def aggregator(self) -> psutil.Process:
        return psutil.Process(self.events("open")[0]["aggregator"])

    def journals(self) -> list[Path]:
        """Of the run or runs, not the feeds; oldest first."""
        found = []
        for path in find_journals(self.root / "wandb"):
            with suppress(JournalCorruptError), JournalReader.open(path) as reader:  # one that is just being created
                if reader.header.role == "run":
                    found.append((reader.header.writer, path))
        return [path for _, path in sorted(found)]

    def rows(self) -> list[dict[str, Any]]:
        return [row for path in self.journals() for row in rows_of(path)]

    def stop(self) -> None:
        self.open_gate()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(10)
