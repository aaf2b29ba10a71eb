"""The processes of one trial, told by a mark in their environment; what they are, and killing them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import msgspec

SENTINEL = "launch/sentinel.py"


class Family(msgspec.Struct):
    """The live processes of a trial by what they are."""

    launcher: int | None = None
    ranks: dict[int, int] = {}
    aggregators: list[int] = []
    shippers: list[int] = []
    others: list[int] = []

    def job(self) -> list[int]:
        """All but the shippers, which outlive a job on purpose."""
        return [*([self.launcher] if self.launcher else []), *self.ranks.values(), *self.aggregators, *self.others]


def scan() -> dict[int, tuple[list[str], bytes]]:
    """pid -> (command, environment) of every process that is not a zombie."""
    found = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  (a Path each would be half of the time)
        if entry.isdigit():
            with suppress(OSError):
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
                if command:  # kernel threads and zombies have none
                    found[int(entry)] = (
                        command.decode(errors="replace").split("\0"),
                        Path(f"/proc/{entry}/environ").read_bytes(),
                    )
    return found


def family_of(mark: str, script: str, launcher: int | None, sentinels: set[int]) -> Family:
    """The live processes with `mark`, of a job whose ranks run `script`. Adds the launcher's sentinels to `sentinels`: they
    have no environment to tell them by, so they are known only while their launcher lives."""
    found = Family()
    for pid, (command, environment) in scan().items():
        line = " ".join(command)
        if mark.encode() not in environment:
            if SENTINEL in line and launcher is not None and parent_of(pid) == launcher:
                sentinels.add(pid)
        elif "wbdist.run.shipper" in line:
            found.shippers.append(pid)
        elif "wbdist.distributed.aggregator" in line:
            found.aggregators.append(pid)
        elif pid == launcher:
            found.launcher = pid
        elif script in line and (rank := _variable(environment, "RANK")) is not None:
            found.ranks[int(rank)] = pid
        else:
            found.others.append(pid)
    return found


def marked(mark: str) -> list[int]:
    return [pid for pid, (_, environment) in scan().items() if mark.encode() in environment]


def is_sentinel(pid: int) -> bool:
    try:
        return SENTINEL.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """False when it was gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _variable(environment: bytes, name: str) -> str | None:
    for entry in environment.split(b"\0"):
        key, _, value = entry.partition(b"=")
        if key == name.encode():
            return value.decode()
    return None
