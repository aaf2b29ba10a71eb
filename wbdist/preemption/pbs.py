"""PBS: how long its signals leave, and when it got the job. `qdel`, `qrerun` and preemption by requeue send SIGTERM, then
SIGKILL after `kill_delay`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping

from wbdist.preemption.asking import answer_of, local_time

KILL_DELAY = 10.0
"""Default of the queue's attribute `kill_delay`; where it is another, set WBDIST_GRACE to it."""
GRACE: Mapping[int, float] = {signal.SIGTERM: KILL_DELAY}
"""Seconds until SIGKILL, by signal."""
JOB = "PBS_JOBID"
"""Set within a job."""
QUEUED = re.compile(r"^\s*qtime = (.+)$", re.MULTILINE)


def submitted(env: Mapping[str, str]) -> float | None:
    """Unix time at which the job came into its queue, as `qstat` says; None where it does not. Blocks up to 5 s."""
    found = QUEUED.search(answer_of(["qstat", "-f", env.get(JOB, "")], env) or "")
    return None if found is None else local_time(found[1])
