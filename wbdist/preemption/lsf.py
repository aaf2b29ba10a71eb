"""LSF: how long its signals leave. `bkill` and LSF itself send SIGINT, 10 s later SIGTERM, 10 s later SIGKILL
(JOB_TERMINATE_INTERVAL). An earlier warning, `bsub -wa USR2 -wt 2`, is a signal without a time, which only the submitter knows.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

INTERVAL = 10.0
GRACE: Mapping[int, float] = {signal.SIGINT: 2 * INTERVAL, signal.SIGTERM: INTERVAL}
"""Seconds until SIGKILL, by signal."""
JOB = "LSB_JOBID"
"""Set within a job."""
