"""LSF: how long its signals leave, and when it got the job. `bkill` and LSF itself send SIGINT, 10 s later SIGTERM, 10 s later
SIGKILL (JOB_TERMINATE_INTERVAL). An earlier warning, `bsub -wa USR2 -wt 2`, is a signal without a time: only who submitted the
job knows it.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping

from wbdist.preemption.asking import answer_of, local_time

INTERVAL = 10.0
GRACE: Mapping[int, float] = {signal.SIGINT: 2 * INTERVAL, signal.SIGTERM: INTERVAL}
"""Seconds until SIGKILL, by signal."""
JOB = "LSB_JOBID"
"""Set within a job."""
SUBMITTED = re.compile(r"^(\w{3}) (\w{3} +\d+ +\d+:\d\d:\d\d)(?: (\d{4}))?: Submitted from host", re.MULTILINE)
DAY = 86400.0
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def submitted(env: Mapping[str, str]) -> float | None:
    """Unix time at which the job was submitted, as `bjobs` says; None where it does not. Blocks up to 5 s."""
    job, index = env.get(JOB, ""), env.get("LSB_JOBINDEX", "0")
    found = SUBMITTED.search(answer_of(["bjobs", "-l", job if index in {"", "0"} else f"{job}[{index}]"], env) or "")
    if found is None:
        return None
    weekday, moment, year = found.groups()
    if year:
        return local_time(f"{weekday} {moment} {year}")
    # The year is only said where LSB_DISPLAY_YEAR is set: it was the last one in which this day was that day of the week.
    this = time.localtime().tm_year
    for candidate in range(this, this - 12, -1):
        when = local_time(f"{weekday} {moment} {candidate}")
        if when is not None and when < time.time() + DAY and WEEKDAYS[time.localtime(when).tm_wday] == weekday:
            return when
    return None
