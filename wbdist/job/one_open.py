"""At most one job is open in a process: signals, seeds, the process group and the word to the launcher are the process's."""

from __future__ import annotations

import os
from collections import Counter

from wbdist.errors import UsageError

_open: tuple[int, str] | None = None
"""The process that opened the job, and which job: what a fork inherits is its parent's."""
_jobs: Counter[str] = Counter()
"""Of each incarnation, the jobs (and `checkpoints`) that went to meet their peers: in step, so that all ranks count alike."""


def take(which: str) -> None:
    """Any rank, not in step, before anything of job `which` is touched: it counts as open until `release`.

    Raises UsageError, having changed nothing, while a job is open in this process, the same one or another.
    """
    global _open  # noqa: PLW0603  (a fact about the process)
    if _open is not None and _open[0] == os.getpid():
        raise UsageError(
            f"a job is open in this process already ({_open[1]}), and a process has one at a time: use that one, or enter "
            f"{'it' if which == _open[1] else f'this one ({which})'} after its `with` block has ended"
        )
    _open = (os.getpid(), which)


def release() -> None:
    """The job of this process is open no longer, however it was left. Idempotent."""
    global _open  # noqa: PLW0603
    _open = None


def incarnation() -> str | None:
    """All ranks, in step, once a job or `checkpoints`: the name under which its ranks meet, None where they agree on one.

    The launcher names the processes, and a process may have one after the other. All of them use the same keys, so that
    the second would read there what the first has left.
    """
    name = os.environ.get("WBDIST_INCARNATION")
    if not name:
        return None
    _jobs[name] += 1
    return f"{name}/{_jobs[name]}"
