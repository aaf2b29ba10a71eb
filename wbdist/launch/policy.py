"""After an attempt: again or not, when, with which exit code. No I/O; the same for one host and for many.

The budget of restarts is spent by attempts in a row that committed nothing new: a job that moves on between crashes may crash
as often as the machine likes, one that does not move stops soon. A preempted attempt counts in the same way when it is started
again in place. The pause before a restart grows with the same number.
"""

from __future__ import annotations

import random
import signal
from typing import Literal

import msgspec

from wbdist.errors import EXIT_FAILED_FOR_GOOD, EXIT_FENCED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_RETRYABLE
from wbdist.launch.judgement import Judgement

OnPreempt = Literal["exit", "relaunch", "requeue"]

BACKOFF = (1.0, 30.0)
"""First and longest pause before a restart without progress, in seconds; doubled each time, times 0.75 to 1.25."""
STAY_STOPPED = (signal.SIGINT, signal.SIGHUP)
"""A person stopped it (Ctrl-C, the terminal closed): never started again in place."""


class Decision(msgspec.Struct, frozen=True):
    """What becomes of the job."""

    exit_code: int | None
    """None: it is started again."""
    sentence: str
    """For people; where `requeue` is True without its end, which the scheduler's answer is."""
    pause: float = 0.0
    """Seconds before it is started again."""
    requeue: bool = False
    """The scheduler is to be asked for another start before leaving."""


class Policy:
    """What the job has come to so far. `note` and then `decide` after each attempt."""

    def __init__(self, *, max_restarts: int, on_preempt: OnPreempt, committed: int = -1, idle: int = 0) -> None:
        self._max_restarts, self._on_preempt = max_restarts, on_preempt
        self.committed = committed
        """The newest committed step that a rank has reported, -1 for none."""
        self.idle = idle
        """Attempts in a row without a new one."""

    def note(self, newest: int) -> None:
        """An attempt has ended, and `newest` is the newest committed step that its ranks reported."""
        self.idle = 0 if newest > self.committed else self.idle + 1
        self.committed = max(newest, self.committed)

    def decide(self, judgement: Judgement, stopped_by: int | None) -> Decision:
        """After `note`: `stopped_by` is the signal that told us to stop, if any."""
        code, why = judgement.exit_code, judgement.why
        spent = self.idle > self._max_restarts
        leaving = f"{why} (exit code {code})"
        if code == EXIT_FINISHED:
            return Decision(code, why)
        if code in {EXIT_FAILED_FOR_GOOD, EXIT_FENCED}:
            return Decision(code, f"{why}; not started again (exit code {code})")
        if code == EXIT_PREEMPTED:
            stays = stopped_by in STAY_STOPPED
            if self._on_preempt == "relaunch" and not stays and not spent:
                return self._again(why)
            if self._on_preempt == "requeue" and not stays:
                return Decision(code, why, requeue=True)
            return Decision(code, f"{why}; run the same command to continue (exit code {code})")
        if stopped_by is not None:
            return Decision(code, leaving)
        if spent:
            tries = f"{self.idle} attempt(s) in a row without a new checkpoint"
            end = f"giving up (--max-restarts {self._max_restarts}, exit code {EXIT_RETRYABLE})"
            return Decision(EXIT_RETRYABLE, f"{why}; {tries}, {end}")
        return self._again(why)

    def stopped(self, received: int) -> Decision:
        """Signal `received` came when no attempt was running: there is to be none."""
        code = EXIT_PREEMPTED if self.committed >= 0 else 128 + received
        return Decision(code, f"{signal.Signals(received).name} between two attempts: leaving (exit code {code})")

    def _again(self, why: str) -> Decision:
        first, longest = BACKOFF
        pause = min(first * 2 ** (self.idle - 1), longest) * random.uniform(0.75, 1.25) if self.idle else 0.0
        return Decision(None, f"{why}; starting again" + (f" in {pause:.1f} s" if pause else ""), pause)
