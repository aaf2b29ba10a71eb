"""When processes were started and ended, by the machine's clock since it was booted: nobody sets that one, all processes of the
machine share it, and it goes on while the machine sleeps. A launcher tells its ranks in variables.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

BEGAN = "WBDIST_BEGAN_AT"
"""When the launcher began this start of the ranks."""
LAST_BEGAN, LAST_ENDED = "WBDIST_LAST_BEGAN_AT", "WBDIST_LAST_ENDED_AT"
"""When it began the one before, and when the first rank of that ended."""
PER_START = (BEGAN, LAST_BEGAN, LAST_ENDED)
LATER = 1.0
"""Seconds by which a process may seem to be older than the launcher's start of it."""


class Start(msgspec.Struct, frozen=True):
    """How this process came to be, in seconds since boot."""

    began: float
    last_began: float | None = None
    last_ended: float | None = None


def now() -> float:
    """Seconds since the machine was booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_began() -> float:
    """When this process was started; a moment ago where that cannot be known, or a person types into it."""
    present = now()
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return present
    try:
        words = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        return min(present, int(words[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return present


def of_monotonic(moment: float) -> float:
    """A recent reading of `time.monotonic` on this clock."""
    return now() - (time.monotonic() - moment)


def variables(start: Start) -> dict[str, str]:
    """For the ranks' environment."""
    told = {BEGAN: start.began, LAST_BEGAN: start.last_began, LAST_ENDED: start.last_ended}
    return {name: f"{moment:.6f}" for name, moment in told.items() if moment is not None}


def start_of_process(env: Mapping[str, str] | None = None) -> Start:
    """As the launcher told it, when one did and it can be ours; else what the process knows of itself."""
    env = os.environ if env is None else env
    own = process_began()
    try:
        began, *last = (float(env[name]) if name in env else None for name in PER_START)
    except ValueError:
        began, last = None, [None, None]
    if began is None or began > own + LATER:
        return Start(own)
    return Start(min(began, own), *last)
