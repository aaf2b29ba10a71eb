"""The process that outlives a killed supervisor just long enough to leave no orphans.

    python -m wbdist.launch.sentinel        (started by the supervisor; reads "+pid" and "-pid" lines from standard input)

When its input ends and ranks are still listed, the supervisor was killed: the ranks get SIGTERM (those that watch their
parent have it already, and are saving), and SIGKILL with their whole process groups SECONDS later. Rejected:
PR_SET_PDEATHSIG alone, which does not reach DataLoader workers and cannot first ask and then insist.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

SECONDS = 4.0
"""Between asking and killing: nothing is left 5 s after the supervisor."""


class Sentinel:
    """The supervisor's end. A context manager; leaving it ends the sentinel."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C at the terminal must not end it. -S and -E: a bare interpreter is all it needs.
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__], stdin=subprocess.PIPE, start_new_session=True, close_fds=True
        )
        return self

    def watch(self, pid: int) -> None:
        """`pid` is a rank, and the leader of its process group where it has one."""
        self._send(f"+{pid}")

    def forget(self, pid: int) -> None:
        """`pid` has been reaped: its number may belong to somebody else soon."""
        self._send(f"-{pid}")

    def _send(self, line: str) -> None:
        assert self._process is not None
        pipe: IO[bytes] | None = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            # Somebody killed the sentinel. The job goes on; only the protection against our own SIGKILL is gone.
            sys.stderr.write("wbdist launch: the sentinel process is gone; ranks may be orphaned if this launcher is killed\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process is not None
        self._process.communicate(timeout=SECONDS + 5)


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        for send in (os.killpg, os.kill):
            try:
                send(pid, number)
            except (ProcessLookupError, PermissionError):
                continue


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ranks: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            ranks.add(pid)
        else:
            ranks.discard(pid)
    if not ranks:
        return
    _signal(ranks, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in ranks):
        time.sleep(0.05)
    _signal(ranks, signal.SIGKILL)


if __name__ == "__main__":
    main()
