"""The process that outlives a killed supervisor just long enough to leave no orphans.

    python wbdist/launch/sentinel.py        (started by the supervisor; reads "+pid" and "-pid" lines from standard input)

Its input ends when the supervisor does, however it does. The ranks still listed then get SIGTERM (those that watch their
parent have it already, and are saving), and SECONDS later SIGKILL with their whole process groups. Rejected:
PR_SET_PDEATHSIG in the ranks alone, which does not reach DataLoader workers and cannot first ask and then insist; a thread
in each rank, which a rank that holds the GIL, or is killed too, would not run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import subprocess

SECONDS = 3.0
"""Between asking and killing: nothing is left 5 s after the supervisor."""


class Sentinel:
    """The supervisor's end. A context manager; leaving it ends the sentinel."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lost = False
        # A forked rank must not hold the pipe open by which the sentinel knows that the supervisor lives.
        os.register_at_fork(after_in_child=self._let_go)

    def __enter__(self) -> Self:
        import subprocess

        # A session of its own: Ctrl-C at the terminal must not end it. No environment and no site: it needs neither.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True, env={}
        )
        return self

    def _let_go(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def watch(self, pid: int) -> None:
        """`pid` is a rank, and the leader of its process group or soon to be."""
        self._send(f"+{pid}")

    def forget(self, pid: int) -> None:
        """`pid` and its group are gone: the number may belong to somebody else soon."""
        self._send(f"-{pid}")

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            if not self._lost:
                # The job goes on; only the protection against our own SIGKILL is gone.
                sys.stderr.write(
                    "wbdist launch: the sentinel was killed; if this launcher is killed too, ranks may be orphaned\n"
                )
            self._lost = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            self._lost = True
        self._process.wait(SECONDS + 5)


def kill_group(pid: int, number: int = signal.SIGKILL) -> bool:
    """Sends `number` to the process group led by `pid`; False when there is none any more."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # there is a member that changed its user; the others got it
    return True


def group_is_alive(pid: int) -> bool:
    """Whether the process group led by `pid` has a member that is not a zombie. (Orphaned zombies wait for an init process to
    reap them, which many containers do not have.)"""
    if not kill_group(pid, 0):
        return False
    try:
        processes = [name for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (no pathlib in the sentinel)
    except FileNotFoundError:
        return True
    return any(_is_member(process, pid) for process in processes)


def _is_member(process: str, group: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            state, _parent, pgrp = file.read().rpartition(b")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(pgrp) == group and state not in {b"Z", b"X"}


def _ask(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ranks: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            ranks.add(pid)
        else:
            ranks.discard(pid)
    alive = [pid for pid in ranks if _ask(pid)]
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and any(_is_alive(pid) for pid in alive):
        time.sleep(0.05)
    for pid in ranks:
        if not kill_group(pid) and _is_alive(pid):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
