"""Ranks as subprocesses, their output line by line on one terminal, each line with its rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

COLOURS = (36, 33, 35, 32, 34, 31)
"""ANSI colours of the rank labels, on a terminal."""
LINE_LIMIT = 1 << 16
"""Longest line kept together, in bytes; a rank that prints no newline must not fill our memory."""


class CommandRanks:
    """Starts one command per rank; use `start` as the supervisor's `start_ranks`."""

    def __init__(self, command: Sequence[str], log_dir: Path | None = None) -> None:
        self._command = list(command)
        self._log_dir = log_dir
        self._lock = threading.Lock()
        self._pumps: list[threading.Thread] = []

    def start(self, environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[bytes]]:
        """Starts one process group a rank. Raises OSError when the interpreter cannot be started."""
        self._join()
        alone = len(environments) == 1 and self._log_dir is None
        started: list[subprocess.Popen[bytes]] = []
        try:
            for extra in environments:
                process = subprocess.Popen(
                    self._command,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **extra, "WBDIST_LAUNCHER_PID": str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    stdout=None if alone else subprocess.PIPE,
                    stderr=None if alone else subprocess.PIPE,
                    process_group=0,
                )
                started.append(process)
                if not alone:
                    self._pump(process, int(extra["RANK"]), int(extra["WBDIST_RESTART"]))
        except BaseException:
            for process in started:
                process.kill()
            raise
        return started

    def _pump(self, process: subprocess.Popen[bytes], rank: int, restart: int) -> None:
        for name, source, sink in (("out", process.stdout, sys.stdout.buffer), ("err", process.stderr, sys.stderr.buffer)):
            assert source is not None
            copy = None
            if self._log_dir is not None:
                self._log_dir.mkdir(parents=True, exist_ok=True)
                copy = (self._log_dir / f"rank-{rank}.{restart}.{name}").open("wb")
            label = f"[rank {rank}] "
            if sink.isatty():
                label = f"\x1b[{COLOURS[rank % len(COLOURS)]}m{label.rstrip()}\x1b[0m "
            thread = threading.Thread(target=self._copy, args=(source, sink, copy, label.encode()), daemon=True)
            thread.start()
            self._pumps.append(thread)

    def _copy(self, source: IO[bytes], sink: IO[bytes], copy: IO[bytes] | None, label: bytes) -> None:
        with source:
            while line := source.readline(LINE_LIMIT):
                whole = line if line.endswith(b"\n") else line + b"\n"
                with self._lock:
                    sink.write(label + whole)
                    sink.flush()
                if copy is not None:
                    copy.write(line)
                    copy.flush()
        if copy is not None:
            copy.close()

    def _join(self) -> None:
        """The ranks have ended: what they wrote comes out before what is said next. A helper that keeps a pipe open may not
        hold us for more than a second."""
        for pump in self._pumps:
            pump.join(1.0)
        self._pumps.clear()

    def close(self) -> None:
        """After the last attempt: returns when its output is out, at most a second or so later."""
        self._join()
