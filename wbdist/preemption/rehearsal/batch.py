"""What batch schedulers do to a job: signals in their order, and for Slurm a `scontrol` that says what the real one would."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from wbdist.preemption.lsf import INTERVAL
from wbdist.preemption.lsf import JOB as LSF_JOB
from wbdist.preemption.pbs import JOB as PBS_JOB
from wbdist.preemption.rehearsal.runner import Event

SCONTROL = """#!/bin/sh
case "$1 $2" in
"show job") cat "{state}" ;;
*) echo "scontrol: rehearsed: $*" >&2 ;;
esac
"""
JOB = "4242"
Ending = Literal["preempt", "cancel", "timeout"]


class SlurmRehearsal:
    """A directory with a `scontrol` for the PATH, and the state of one job."""

    def __init__(self, directory: Path, limit: float) -> None:
        """`limit`: seconds from now until the job's time is up."""
        self._state = directory / "job"
        self._end = time.time() + limit
        self._say("RUNNING")
        program = directory / "scontrol"
        program.write_text(SCONTROL.format(state=self._state))
        program.chmod(0o755)
        self.environment = {
            "PATH": f"{directory}{os.pathsep}{os.environ.get('PATH', '')}",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_END_TIME": str(int(self._end)),
            "SLURM_RESTART_COUNT": "0",
        }
        """What a process of the job sees."""

    def cancel(self) -> None:
        """As after `scancel`, while processes are left."""
        self._say("COMPLETING")

    def extend(self, limit: float) -> None:
        """As after `scontrol update TimeLimit=...`: so many seconds from now."""
        self._end = time.time() + limit
        self._say("RUNNING")

    def _say(self, state: str) -> None:
        end = datetime.fromtimestamp(self._end).isoformat(timespec="seconds")  # noqa: DTZ006  (the controller's zone, as scontrol)
        beside = self._state.with_suffix(".new")
        beside.write_text(f"JobId={JOB} JobName=train JobState={state} Reason=None Restarts=0 EndTime={end} NodeList=n1\n")
        beside.replace(self._state)

    def events(self, ending: Ending, after: float) -> list[Event]:
        """The signals, `after` seconds after the start; the end of the machine is not among them."""
        if ending == "timeout":
            return [
                Event(after, "Slurm: SIGUSR2 before the end of the time (--signal)", lambda pid: os.kill(pid, signal.SIGUSR2))
            ]
        what = "Slurm: preempted, SIGCONT and SIGTERM" if ending == "preempt" else "Slurm: cancelled, SIGCONT and SIGTERM"

        def happen(pid: int) -> None:
            if ending == "cancel":
                self.cancel()
            _send(pid, (signal.SIGCONT, signal.SIGTERM))

        return [Event(after, what, happen)]


def lsf(after: float) -> tuple[dict[str, str], list[Event], float]:
    """`bkill`: environment, signals, and when the job is killed."""
    events = [
        Event(after, "LSF: SIGINT", lambda pid: os.kill(pid, signal.SIGINT)),
        Event(after + INTERVAL, "LSF: SIGTERM", lambda pid: os.kill(pid, signal.SIGTERM)),
    ]
    return {LSF_JOB: JOB}, events, after + 2 * INTERVAL


def pbs(after: float, delay: float) -> tuple[dict[str, str], list[Event], float]:
    """`qdel` or `qrerun`: environment, signals, and when the job is killed."""
    return {PBS_JOB: f"{JOB}.server"}, [Event(after, "PBS: SIGTERM", lambda pid: os.kill(pid, signal.SIGTERM))], after + delay


def _send(pid: int, numbers: Sequence[int]) -> None:
    for number in numbers:
        os.kill(pid, number)
