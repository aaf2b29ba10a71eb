"""Which lines of a run are live: the one primitive under resume, rewind and fork.

Each attempt names the watermark it was built upon. Walking from the newest attempt down these bases gives the live
view; every other line stays in the archive. Nothing is ever deleted, so going back is only another walk.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from wbdist.core.position import Counts, Watermark

_PREEMPTED = 75
"""errors.EXIT_PREEMPTED; core imports nothing."""


class Segment(msgspec.Struct, frozen=True):
    """The live part of one attempt: all of it (`limits` is None) or the first lines of each stream and writer."""

    attempt: int
    limits: Counts | None = None

    def admits(self, stream: str, writer: str, seq: int) -> bool:
        """Whether line `seq` of `writer` in `stream` is below this segment's limit."""
        if self.limits is None:
            return True
        return seq < self.limits.get(stream, {}).get(writer, 0)


def live_view(bases: Mapping[int, Watermark | None], attempt: int) -> tuple[Segment, ...]:
    """The segments visible in `attempt`, oldest first.

    `bases` maps each attempt to the watermark it started from, None for a start from nothing. Raises ValueError when a
    base points to an unknown attempt or not downwards, since the walk could then loop.
    """
    if attempt not in bases:
        raise ValueError(f"attempt {attempt} is unknown; known are {sorted(bases)}")
    segments = [Segment(attempt)]
    base = bases[attempt]
    while base is not None:
        below = base.attempt
        if below not in bases or below >= segments[-1].attempt:
            raise ValueError(
                f"attempt {segments[-1].attempt} is based on attempt {below}; it must be an older, known one of {sorted(bases)}"
            )
        segments.append(Segment(below, base.counts))
        base = bases[below]
    return tuple(reversed(segments))


def describe_end(end_cause: str, exit_code: int | None) -> str:
    """How an attempt ended, in a word for people; '' while it runs.

    `exit` is the writer's own word, so the exit code says what it means; other causes ('lost', 'silence', 'superseded', ...)
    speak for themselves.
    """
    if end_cause not in {"exit", "exit_zero", "exit_nonzero"}:
        return end_cause
    if exit_code == 0:
        return "finished"
    if exit_code == _PREEMPTED:
        return "preempted"
    return "failed" if exit_code is None else f"failed ({exit_code})"
