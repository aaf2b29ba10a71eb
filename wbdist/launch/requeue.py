"""Asks Slurm to queue the job of this process again.

Slurm (22.05, tried on a real one) does not do it for us: a job that uses its GraceTime to save and leaves with a non-zero code
counts as failed, whatever the PreemptMode. What is asked for must not undo an `scancel`, and the facts are easily misread:
while processes of the job are left, a cancelled and a requeued job are both "COMPLETING".

| JobState             | Restarts   | what happened                                 | what we do        |
|----------------------|------------|-----------------------------------------------|-------------------|
| RUNNING              | as for us  | notice, end of time near, or within GraceTime | scontrol requeue  |
| any                  | more       | somebody, or Slurm itself, has requeued it    | nothing: it is    |
| COMPLETING, others   | as for us  | scancel                                       | nothing: it stays |
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping

import msgspec

from wbdist.errors import UsageError

PATIENCE = 20.0
"""Seconds for one question to Slurm's controller."""
TRIES = 3
"""A controller that restarts, or is busy, is asked again."""


class Answer(msgspec.Struct, frozen=True):
    """What became of the wish."""

    queued: bool
    """The job will start again without anybody doing anything."""
    sentence: str


def job_of(env: Mapping[str, str] | None = None) -> str:
    """The Slurm job that this process belongs to, as `scontrol requeue` takes it. Raises UsageError outside of one."""
    env = os.environ if env is None else env
    if env.get("SLURM_ARRAY_JOB_ID") and env.get("SLURM_ARRAY_TASK_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    if env.get("SLURM_JOB_ID"):
        return env["SLURM_JOB_ID"]
    raise UsageError(
        "only a Slurm job can be queued again from inside, and this is none (SLURM_JOB_ID is not set); "
        "elsewhere leave with code 75 (--on-preempt exit) and let the scheduler start the same command again"
    )


def requeue() -> Answer:
    """Any process of a Slurm job, when its state is saved: has it queued again unless it was cancelled.

    Blocks at most TRIES times PATIENCE seconds; never raises for what Slurm says. Slurm ends the job's processes at once then.
    """
    job = job_of()
    problem = ""
    for number in range(TRIES):
        if number:
            time.sleep(1.0)
        asked = _scontrol("show", "job", "-o", job)
        if asked.returncode != 0:
            problem = asked.stderr.strip()
            continue
        facts = dict(word.partition("=")[::2] for word in asked.stdout.split())
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if facts.get("Restarts", "0").isdigit() and int(facts.get("Restarts", "0")) > restarts:
            return Answer(True, f"Slurm job {job} is queued again")
        if facts.get("JobState") != "RUNNING":
            return Answer(False, f"Slurm job {job} was cancelled: not queued again")
        # Slurm may end this scontrol together with the rest of the job, so its own exit code says little: look again.
        problem = _scontrol("requeue", job).stderr.strip()
        if not problem:
            return Answer(True, f"Slurm job {job} is queued again")
    return Answer(False, f"Slurm did not queue job {job} again ({problem}); do it by hand: scontrol requeue {job}")


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
