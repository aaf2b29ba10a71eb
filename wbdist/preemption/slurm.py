"""Slurm: when the job's time ends, and what a SIGTERM from it means.

The signals themselves (`--signal`, GraceTime, scancel) arrive as signals do; here they get their meaning. Within GraceTime a
job is RUNNING; one that was cancelled is COMPLETING long before its time is up, with as many restarts as we know of.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import datetime

from wbdist.preemption.asking import answer_of
from wbdist.preemption.notice import Notice

SURE = 5.0
"""Seconds before the end of its time until which a job that is ending must have been cancelled."""


class SlurmJob:
    """The job that this process belongs to."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = os.environ if env is None else env
        self._job = self._env.get("SLURM_JOB_ID", "")
        array, task = self._env.get("SLURM_ARRAY_JOB_ID"), self._env.get("SLURM_ARRAY_TASK_ID")
        self._asked_for = f"{array}_{task}" if array and task else self._job
        """One task of an array has the array's own number, and by that all of its tasks would be shown."""

    def end(self) -> float | None:
        """Unix time at which its time is up, as the controller says now, else as it was at the start; None without a limit."""
        told = self._ask().get("EndTime", "")
        try:
            return datetime.fromisoformat(told).timestamp()  # in the controller's zone, which is ours
        except ValueError:
            said = self._env.get("SLURM_JOB_END_TIME", "")
            return float(said) if said.isdigit() else None

    def submitted(self) -> float | None:
        """Unix time at which it was submitted, or queued again; None where the controller does not say."""
        try:
            return datetime.fromisoformat(self._ask().get("SubmitTime", "")).timestamp()
        except ValueError:
            return None

    def explain(self, number: int) -> Notice | None:
        """What stands behind the signal `number`: cancelled by a person, or only its time. May take 5 s."""
        del number
        facts = self._ask()
        limit = self._env.get("SLURM_JOB_END_TIME", "")
        end = float(limit) if limit.isdigit() else None
        ending = facts.get("JobState", "RUNNING").split(",")[0] in {"CANCELLED", "COMPLETING"}
        requeued = facts.get("Restarts", "0") != self._env.get("SLURM_RESTART_COUNT", "0")
        if ending and not requeued and (end is None or time.time() < end - SURE):
            return Notice("slurm", "the job was cancelled", time.monotonic(), cancelled=True)
        return None if end is None else Notice("slurm", "the job's time is up", time.monotonic(), end)

    def _ask(self) -> dict[str, str]:
        answer = answer_of(["scontrol", "show", "job", "-o", self._asked_for], self._env) if self._job else None
        # One line a job: several for one that has parts of different kinds.
        jobs = [dict(word.partition("=")[::2] for word in line.split()) for line in (answer or "").splitlines()]
        return next((job for job in jobs if job.get("JobId") == self._job), {})
