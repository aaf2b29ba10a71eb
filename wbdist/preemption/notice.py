"""A preemption notice: somebody says that this job has to stop soon."""

from __future__ import annotations

import msgspec


class Notice(msgspec.Struct, frozen=True):
    """Where it came from, why, and how long is left."""

    source: str
    """Which source heard it: 'signal', 'file', 'peer', ..."""
    reason: str
    """For people: 'SIGTERM', the content of a file, ..."""
    received: float
    """time.monotonic() of this process when it arrived."""
    deadline: float | None = None
    """Unix time by which everything must be done, since other ranks and hosts must understand it; None when nobody says."""
    fenced: bool = False
    """No preemption: another job has the run, so this one must stop and write nothing more."""
    cancelled: bool = False
    """A person ended the job for good: it saves, but nothing may start it again."""
    advice: bool = False
    """Not yet a reason to stop: the machine may go, or goes much later. A checkpoint now is cheap insurance; then go on."""
