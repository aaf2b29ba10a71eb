"""Where the wall-clock time of a job went, from its submission to its end: a partition of it into phases, over all attempts.

A process writes a *mark* when its phase changes: what each phase has taken so far, by a clock that nobody sets, and the wall
clock's reading. So within an attempt the clock may be set as it likes; the wall clock only joins attempts, by its last reading
in one and its first in the next.

    ... down | queued | startup restore startup train save train save train (lost) stop | down ...
             submitted  process starts                                killed or left

A mark carries totals, so any one that is missing costs nothing once a later one is there. An attempt that was killed has no
last word: its last phase lasts until its last sign of life (a row, a sample, or what the launcher saw), the rest is `down`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

OWN = ("startup", "restore", "train", "save", "stop")
"""The phases of a process, in the order in which they come."""
PHASES = ("queued", "down", "startup", "restore", "train", "lost", "save", "stop")
"""All phases of an attempt; they add up to the time from the end of the attempt before (or the submission) to its own end."""
END = "end"
"""The phase of an attempt's last mark."""
SLACK = 2.0
"""Seconds that a scheduler's clock may be behind when it says, in whole seconds, when it queued a job again."""
WORDS = {"startup": "start-up"}
_TIMES = ("submitted", "last_began", "last_ended")
_SHOWN = 0.05
"""Seconds from which a phase is worth a word."""


class Mark(msgspec.Struct, frozen=True):
    """One record of an attempt's timeline."""

    number: int
    """From 0 in an attempt; tells a repeated one."""
    at: float
    """The wall clock's reading, Unix seconds."""
    phase: str
    """Which of OWN begins, or END."""
    step: int
    """Steps completed by then."""
    spent: dict[str, float]
    """Seconds in each of OWN from the start of the first process until now."""
    submitted: float | None = None
    """Unix time at which a scheduler got this attempt to start."""
    last_began: float | None = None
    """Unix time at which the launcher started the processes before these, which need not have got as far as an attempt."""
    last_ended: float | None = None
    """Unix time at which it saw the first of them end."""


class Life(msgspec.Struct, frozen=True):
    """What is known of one attempt."""

    attempt: int
    started: float
    """Unix time at which its run was opened."""
    marks: Sequence[Mark] = ()
    seen: float = 0.0
    """Unix time of its last row or sample; 0 without one."""
    base: tuple[int, int] | None = None
    """Attempt and step that it goes on from; None: it starts from nothing, or from another run."""
    lost: float = 0.0
    """Seconds of work that is archived, as its rows tell: for what its marks do not."""


class Goodput(msgspec.Struct, frozen=True):
    """What became of a job's time."""

    share: float
    """Of the wall-clock time: training that is in the run's history (0 to 1)."""
    seconds: float
    """Wall-clock time from the first submission, or start, to the end."""
    phases: dict[str, float]
    """Seconds by phase, over all attempts; they add up to `seconds`."""
    attempts: int

    def __str__(self) -> str:
        """One line for people."""
        over = f" over {self.attempts} attempts" if self.attempts > 1 else ""
        shown = [f"{WORDS.get(name, name)} {duration(self.phases[name])}" for name in _TOLD if self.phases[name] >= _SHOWN]
        return f"goodput {100 * self.share:.1f} % of {duration(self.seconds)}{over}: {', '.join(shown)}"


_TOLD = ("train", "save", "restore", "startup", "queued", "down", "stop", "lost")


def read_mark(row: Mapping[str, Any], at: float) -> Mark | None:
    """A mark as it was written; None for what is none: other programs may write such lines, too."""
    number, phase, step = row.get("n"), row.get("phase"), row.get("_step")
    spent = {name: _seconds(row.get(name)) for name in OWN}
    if type(number) is not int or type(step) is not int or phase not in (*OWN, END) or not math.isfinite(at):
        return None
    known = {name: seconds for name, seconds in spent.items() if seconds is not None}
    if len(known) < len(OWN):
        return None
    return Mark(number, at, phase, step, known, **{name: _seconds(row.get(name)) for name in _TIMES})


def written(mark: Mark) -> dict[str, Any]:
    """The other way round, without the time, which every record has."""
    row: dict[str, Any] = {"n": mark.number, "phase": mark.phase, "_step": mark.step, **mark.spent}
    return row | {name: value for name in _TIMES if (value := getattr(mark, name)) is not None}


def phases_of(lives: Iterable[Life]) -> dict[int, dict[str, float]]:
    """attempt -> seconds by phase (all of PHASES); empty when no attempt has a mark.

    The sum over all attempts is the time from the first submission to the last end, whatever is missing or torn. Where an
    attempt went on after the next had begun (a node that was believed dead), it is cut off there.
    """
    ordered = sorted(lives, key=lambda life: life.attempt)
    if not any(life.marks for life in ordered):
        return {}
    kept = kept_steps(ordered)
    out: dict[int, dict[str, float]] = {}
    end: float | None = None
    spans = [_Span(life, after) for life, after in zip(ordered, [*ordered[1:], None], strict=True)]
    for life, span in zip(ordered, spans, strict=True):
        found = dict.fromkeys(PHASES, 0.0)
        found |= span.spent
        found["lost"] = min(_lost(life, span.spent["train"], kept.get(life.attempt)), found["train"])
        found["train"] -= found["lost"]
        submitted = next((mark.submitted for mark in life.marks if mark.submitted is not None), None)
        if end is None:
            found["queued"] = max(0.0, span.origin - submitted) if submitted is not None else 0.0
        else:
            gap = max(0.0, span.origin - end)
            waited = submitted is not None and submitted >= end - SLACK
            found["queued"] = min(gap, max(0.0, span.origin - submitted)) if waited and submitted is not None else 0.0
            found["down"] = gap - found["queued"]
        end = span.end
        out[life.attempt] = found
    return out


def goodput(phases: Iterable[Mapping[str, float]]) -> Goodput | None:
    """All attempts together; None without any."""
    found = list(phases)
    total = {name: sum(one[name] for one in found) for name in PHASES}
    seconds = sum(total.values())
    return Goodput(total["train"] / seconds, seconds, total, len(found)) if seconds > 0 else None


def duration(seconds: float) -> str:
    """`0.4 s`, `41 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class _Span:
    """One attempt's own time, cut where the next one begins."""

    def __init__(self, life: Life, after: Life | None) -> None:
        self.origin = _origin(life)
        self.spent = dict.fromkeys(OWN, 0.0)
        limit = math.inf if after is None else _origin(after)
        seen = life.seen
        if after is not None:
            seen = max([seen, *(ended for began, ended in _watched(after) if abs(began - self.origin) < SLACK)])
        if life.marks:
            last = life.marks[-1]
            self.spent |= last.spent
            self.end = last.at
            current = "stop" if last.phase == END else last.phase
        else:
            # Killed before its first mark; or, with rows, no job's: somebody went on with the run in another way.
            self.end, current = self.origin, "train" if life.seen else "startup"
        extra = max(0.0, min(seen, limit) - self.end)
        self.spent[current] += extra
        self.end += extra
        surplus = min(max(0.0, self.end - limit), sum(self.spent.values()))
        self.end -= surplus
        for name in (current, *reversed(OWN)):
            cut = min(surplus, self.spent[name])
            self.spent[name] -= cut
            surplus -= cut


def _watched(after: Life) -> list[tuple[float, float]]:
    """What a launcher tells of the processes before: when it started them, when the first of them ended."""
    told = ((mark.last_began, mark.last_ended) for mark in after.marks)
    return [(began, ended) for began, ended in told if began is not None and ended is not None]


def _origin(life: Life) -> float:
    """When its first process started, by the wall clock."""
    return life.marks[0].at - sum(life.marks[0].spent.values()) if life.marks else life.started


def kept_steps(lives: Sequence[Life]) -> dict[int, float]:
    """attempt -> the last step of it that is in the history (infinite: all); attempts of which nothing is are left out. `lives`
    by attempt, not empty."""
    by_number = {life.attempt: life for life in lives}
    number, kept = lives[-1].attempt, {lives[-1].attempt: math.inf}
    while (base := by_number[number].base) is not None and base[0] in by_number and base[0] not in kept:
        number = base[0]
        kept[number] = base[1]
    return kept


def _lost(life: Life, trained: float, kept: float | None) -> float:
    """Seconds of training that no later attempt was built upon."""
    if kept is None:
        return trained
    if math.isinf(kept):
        return 0.0
    # The first mark at the boundary is the one with which the save of the checkpoint began.
    saved = next((mark for mark in life.marks if mark.step > kept and mark.phase in {"save", "stop", END}), None)
    return life.lost if saved is None else max(0.0, trained - saved.spent["train"])


def _seconds(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if known else None
