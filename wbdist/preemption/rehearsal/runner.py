"""Runs a command on a machine that, in a while, seems to be taken away."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

MARK = "WBDIST_CHAOS"
"""In the environment of everything that the command starts: what dies when the machine does."""
TICK = 0.02


class Event(msgspec.Struct, frozen=True):
    """Something that befalls the machine."""

    after: float
    """Seconds from the start of the command."""
    what: str
    """For people."""
    happen: Callable[[int], object]
    """Makes it happen; gets the command's pid."""


def rehearse(command: Sequence[str], environment: dict[str, str], events: Sequence[Event], end: float | None) -> int:
    """Runs `command` with `environment` on top of ours, lets the events happen, and `end` seconds after its start kills all
    that is left of it, as the provider would. Returns its exit code, 137 when it had to be killed; says on standard error what
    happens.

    The embedded server and its like are not killed: they stand for a machine elsewhere.
    """
    mark = secrets.token_hex(8)
    process = subprocess.Popen([*command], env={**os.environ, **environment, MARK: mark})
    began = time.monotonic()
    waiting = sorted(events, key=lambda event: event.after)
    noticed: float | None = None
    with _PassingOn(process):
        while process.poll() is None:
            passed = time.monotonic() - began
            while waiting and passed >= waiting[0].after:
                event = waiting.pop(0)
                event.happen(process.pid)
                noticed = passed
                _say(f"{passed:.1f} s: {event.what}")
            if end is not None and passed >= end:
                left = _kill(mark)
                process.wait()
                _say(f"{passed:.1f} s: the machine is gone; {left} process(es) were still there: the job did not leave in time")
                return 128 + signal.SIGKILL
            time.sleep(TICK)
    passed = time.monotonic() - began
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if noticed is None:
        _say(f"{passed:.1f} s: the command ended (exit code {code}) before anything happened; choose a smaller --after")
    else:
        spare = "" if end is None else f", with {end - passed:.1f} s to spare"
        _say(f"{passed:.1f} s: the command left {passed - noticed:.1f} s after the last notice{spare} (exit code {code})")
    return code


class _PassingOn:
    """While it is entered, SIGTERM and Ctrl-C to us are the command's. It gets a terminal's Ctrl-C by itself."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __enter__(self) -> None:
        self._term = signal.signal(signal.SIGTERM, lambda *_: self._process.terminate())
        self._int = signal.signal(signal.SIGINT, lambda *_: None if os.isatty(0) else self._process.send_signal(signal.SIGINT))

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._term)
        signal.signal(signal.SIGINT, self._int)


def _kill(mark: str) -> int:
    """SIGKILLs everything that bears the mark, also what is started meanwhile; how many there were at first."""
    found = _marked(mark)
    first = len(found)
    while found:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(TICK)
        found = _marked(mark)
    return first


def _marked(mark: str) -> list[int]:
    wanted = f"{MARK}={mark}".encode()
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) == os.getpid():
            continue
        try:
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
            environment = (directory / "environ").read_bytes().split(b"\0")
            command = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or somebody else's
        if state not in {"Z", "X"} and wanted in environment and b"server" not in command:
            found.append(int(directory.name))
    return found


def _say(line: str) -> None:
    sys.stderr.write(f"wbdist chaos: {line}\n")
    sys.stderr.flush()
