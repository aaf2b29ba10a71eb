"""What can still be done between a notice and the end: decided by all ranks alike, from what all of them know.

A save that is cut off costs the seconds in which rows could have been shipped, and is worth nothing; the last committed
checkpoint stands anyway. So a save is begun only when what earlier saves took fits into what is left.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

LEAVE = 1.5
"""Seconds kept for leaving: closing the run and handing over its last rows."""
UNMEASURED = 3.0
"""Seconds that must be left for a first save, of which nobody knows how long it takes; it is begun, and bounded."""
MIN_LEAD = 60.0
"""Seconds before a known end (a time limit) at which to stop, when saves take less than that."""
SAFETY = 1.2
"""How much longer than usual the next save may take: at such a moment every machine may be saving."""


class SaveCosts:
    """Seconds that this rank's saves took, from the call to the commit."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=5)

    def add(self, seconds: float) -> None:
        """One more save was committed."""
        self._last.append(seconds)

    @property
    def seconds(self) -> float | None:
        """What the next one will take: the median of the last five, since one that was slow proves nothing about the next, and
        begun in vain a save costs less than not begun. None before the first."""
        return statistics.median(self._last) if self._last else None


def lead(costs: SaveCosts) -> float:
    """Seconds before a known end at which to stop: three saves and the rest, at least MIN_LEAD."""
    return max(MIN_LEAD, 3 * (costs.seconds or 0.0) * SAFETY + 2 * LEAVE)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank knows when all have stopped."""

    now: float
    """Unix time here."""
    deadline: float | None = None
    cancelled: bool = False
    approvable: bool = False
    save_seconds: float | None = None
    saving: float | None = None
    """Seconds since the save began that is still in the background; None when there is none."""
    committed: int = -1
    """Step of the newest checkpoint that this rank knows to be committed."""


class StopPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What all ranks do."""

    act: Literal["save", "finish", "keep"]
    """Save now; wait for the save in the background, since another does not fit; or neither."""
    left: float | None
    """Seconds until everything must be done; None when nobody said."""
    needed: float | None
    """Seconds that a save is believed to take; None when none was made."""
    cancelled: bool
    approvable: bool
    """Some rank's provider waits for our word, which is given when all are done."""
    committed: int

    def timeout(self, most: float) -> float:
        """Seconds for what `act` says, at most `most`."""
        return most if self.left is None else min(most, max(0.0, self.left - LEAVE))

    def because(self) -> str:
        """Why nothing new was saved, for people; '' when it was to be."""
        if self.act == "save":
            return ""
        known = "of unknown length" if self.needed is None else f"of about {self.needed:.1f} s"
        return f"a save {known} does not fit into the {max(self.left or 0.0, 0.0):.1f} s that are left"


def decide(facts: Sequence[Facts]) -> StopPlan:
    """The plan that follows from all ranks' facts; every rank computes it for itself, from the same values.

    Times are compared by the latest clock: of two hosts' clocks the one ahead leaves less time.
    """
    deadlines = [fact.deadline for fact in facts if fact.deadline is not None]
    left = min(deadlines) - max(fact.now for fact in facts) if deadlines else None
    measured = [fact.save_seconds for fact in facts if fact.save_seconds is not None]
    needed = max(measured) * SAFETY if measured else None
    wanted = UNMEASURED if needed is None else needed
    saving = [fact.saving for fact in facts if fact.saving is not None]
    # Saves do not overlap: what is left of the one under way comes before the next.
    rest = max(0.0, wanted - min(saving)) if saving else 0.0
    room = float("inf") if left is None else left - LEAVE
    act: Literal["save", "finish", "keep"] = "keep"
    if room >= rest + wanted:
        act = "save"
    elif saving and room > 0 and room >= rest:
        act = "finish"
    return StopPlan(
        act=act,
        left=left,
        needed=needed,
        cancelled=any(fact.cancelled for fact in facts),
        approvable=any(fact.approvable for fact in facts),
        committed=max((fact.committed for fact in facts), default=-1),
    )
