"""PBS: how long its signals leave. `qdel`, `qrerun` and preemption by requeue send SIGTERM, then SIGKILL after `kill_delay`."""

from __future__ import annotations

import signal
from collections.abc import Mapping

KILL_DELAY = 10.0
"""Default of the queue's attribute `kill_delay`; where it is another, set WBDIST_GRACE to it."""
GRACE: Mapping[int, float] = {signal.SIGTERM: KILL_DELAY}
"""Seconds until SIGKILL, by signal."""
JOB = "PBS_JOBID"
"""Set within a job."""
