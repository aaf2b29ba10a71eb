"""Which lines of a run are live: the one primitive under resume, rewind and fork.

Each attempt names the watermark it was built upon. Walking from the newest attempt down these bases gives the live
view; every other line stays in the archive. Nothing is ever deleted, so going back is only another walk.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from wbdist.core.position import Counts, Watermark

_PREEMPTED = 75
"""errors.EXIT_PREEMPTED; core imports nothing."""


class Segment(msgspec.Struct, frozen=True):
    """The live part of one attempt: all of it (`limits` is None) or the first lines of each stream and writer."""

    attempt: int
    limits: Counts | None = None
    run: int = 0
    """The store's key of the run that the attempt belongs to: a fork shows its source's attempts."""

    def admits(self, stream: str, writer: str, seq: int) -> bool:
        """Whether line `seq` of `writer` in `stream` is below this segment's limit."""
        if self.limits is None:
            return True
        return seq < self.limits.get(stream, {}).get(writer, 0)


class Base(msgspec.Struct, frozen=True):
    """What an attempt is built upon: a cut through the attempts of a run, its own or (a fork) another's."""

    run: int
    watermark: Watermark
    fresh: frozenset[str] = frozenset()
    """Streams of which nothing below shows."""


def live_view(base_of: Callable[[int, int], Base | None], run: int, attempt: int) -> tuple[Segment, ...]:
    """The segments visible in `attempt` of `run`, oldest first.

    `base_of(run, attempt)` is None for a start from nothing. Raises ValueError when the walk comes by an attempt twice: it
    would have no end.
    """
    segments = [Segment(attempt, None, run)]
    seen = {(run, attempt)}
    hidden: frozenset[str] = frozenset()
    base = base_of(run, attempt)
    while base is not None:
        below = (base.run, base.watermark.attempt)
        if below in seen:
            raise ValueError(f"attempt {attempt} is, over {len(seen)} attempts, based on itself")
        seen.add(below)
        hidden |= base.fresh
        counts = {stream: by_writer for stream, by_writer in base.watermark.counts.items() if stream not in hidden}
        segments.append(Segment(below[1], counts, below[0]))
        base = base_of(*below)
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


ENDS = {
    "lost": "killed without a word",
    "silence": "fell silent",
    "superseded": "replaced by the next one",
    "": "ended",
}
"""How an attempt ended, in a few words, where `describe_end` has a term."""
_BEGINNINGS = {
    "": "unknown",
    "start": "first start",
    "restart": "started again",
    "preempted": "after a preemption",
    "lost": "after a lost process",
    "resume": "resumed",
}


def describe_begin(cause: str) -> str:
    """Why an attempt began, for people: a launcher's own words are taken as they are."""
    return _BEGINNINGS.get(cause, cause)
