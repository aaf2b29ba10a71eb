"""What the end of an attempt means: from each rank's exit code and last words to one exit code and one sentence.

Theory. A rank's exit code may be flattened (an uncaught UsageError is Python's 1) or hidden (the script caught our
SystemExit), and then its verdict file knows better; a rank killed while leaving has said what it came to. Ranks that we
ended ourselves, after another had failed, tell nothing. Of the others the gravest decides: failed for good and
fenced forbid a restart; one rank that says "preempted" proves a committed checkpoint, since committing needs all ranks; then
the first that failed is the cause, and what the others say is what that did to them.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

import msgspec

from wbdist.errors import EXIT_FAILED_FOR_GOOD, EXIT_FENCED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_RETRYABLE
from wbdist.launch.intent import Verdict

CONTRACT = frozenset({EXIT_FAILED_FOR_GOOD, EXIT_FENCED, EXIT_RETRYABLE, EXIT_PREEMPTED})
BAD_ARGUMENTS = 2
"""What argparse, click and Python itself ("can't open file") end with: trying again changes nothing."""
TOGETHER = 0.1
"""Seconds within which two ends count as simultaneous; then a death by signal is the cause of an exit, not its effect."""


class RankEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How one rank ended."""

    rank: int
    code: int
    """Exit code; negative for a signal."""
    at: float
    """time.monotonic() when it was seen to have ended."""
    by_us: bool = False
    """We told it to go, because another rank had failed, or killed it."""
    said: Verdict | None = None

    @property
    def meaning(self) -> int:
        """The exit code of the contract that this end stands for."""
        said = None if self.said is None or self.said.verdict == "finished" else self.said
        if self.code == 0:
            return EXIT_PREEMPTED if said is not None and said.verdict == "preempted" else EXIT_FINISHED
        if self.code in CONTRACT:
            return self.code
        if said is not None:
            return said.exit_code
        return EXIT_FAILED_FOR_GOOD if self.code == BAD_ARGUMENTS else EXIT_RETRYABLE

    @property
    def sentence(self) -> str:
        """`rank 1 was killed by SIGKILL`, and the rank's own message when it left one."""
        how = f"ended with exit code {self.code}" if self.code >= 0 else f"was killed by {signal_name(-self.code)}"
        message = "" if self.said is None or not self.said.message else f": {self.said.message}"
        return f"rank {self.rank} {how}{message}"


class Judgement(msgspec.Struct, frozen=True):
    """How an attempt ended."""

    exit_code: int
    why: str
    culprit: int | None = None
    """The rank that made it end, when one did."""


def judge(ends: Sequence[RankEnd], stopped_by: int | None, *, committed: bool) -> Judgement:
    """`stopped_by`: the signal that told the supervisor to stop, if any. `committed`: this job has a committed checkpoint."""
    by_themselves = [end for end in ends if not end.by_us]
    for final in (EXIT_FAILED_FOR_GOOD, EXIT_FENCED):
        for end in by_themselves:
            if end.meaning == final:
                return Judgement(final, end.sentence, end.rank)
    told = "a notice" if stopped_by is None else signal_name(stopped_by)
    if any(end.meaning == EXIT_PREEMPTED for end in ends):
        return Judgement(EXIT_PREEMPTED, f"preempted by {told}, state saved")
    if all(end.meaning == EXIT_FINISHED for end in ends):
        return Judgement(EXIT_FINISHED, "finished")
    if stopped_by is not None:
        if committed:
            return Judgement(EXIT_PREEMPTED, f"stopped by {told} without a save; the last committed checkpoint stands")
        return Judgement(128 + stopped_by, f"stopped by {told} before anything was saved")
    failed = [end for end in by_themselves if end.meaning != EXIT_FINISHED] or [e for e in ends if e.meaning != EXIT_FINISHED]
    first = min(end.at for end in failed)
    cause = min(failed, key=lambda end: (end.at > first + TOGETHER, end.code > 0, end.at, end.rank))
    return Judgement(EXIT_RETRYABLE, cause.sentence, cause.rank)


def signal_name(number: int) -> str:
    """`SIGTERM`; `signal 35` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
