"""When to save: every so many steps, every so many seconds, or as often as failures make it worth.

Whether a step is the one must be the same answer on every rank. For steps it is arithmetic. For times rank 0 decides, and says
with each decision at which later step it will decide again: until that step no rank asks, at it the others read what rank 0
has put into the store. The steps of deciding come closer as the time does, so an interval costs a handful of
small requests off the process group, and a rank waits only as far as it is ahead of rank 0. Rejected: an all-reduce a step
(100-600 us each), and every rank's own clock (one rank would save what the others do not).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from wbdist.checkpoint.claim import attempts
from wbdist.core.coordination import Coordinator
from wbdist.errors import UsageError

_UNITS = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_LONGEST_LOOK = 5.0
"""Seconds after which rank 0 looks again at the latest, as steps go: a job that slows down is noticed."""
PRIOR_MTBF = 6 * 3600.0
"""Seconds between failures that are assumed where none was seen: a spot machine's, roughly."""
PRIOR_COST = 1.0
"""Seconds that a save is taken to cost training before there was one."""


class SavePolicy(msgspec.Struct, frozen=True):
    """One of: every `steps`, every `seconds`, tuned (neither)."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, value: str | int | None) -> Self | None:
        """`50`, "50 steps", "90 seconds", "10 minutes", "2 hours", "auto", or None for no periodic saves.

        Raises UsageError for anything else.
        """
        if value is None:
            return None
        if value == "auto":
            return cls()
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value))
        if match is not None and not isinstance(value, bool) and float(match[1]) > 0:
            unit = match[2] if match[2] in _UNITS else match[2].removesuffix("s")
            if unit in {"", "step"} and match[1].isdigit():
                return cls(steps=int(match[1]))
            if unit in _UNITS:
                return cls(seconds=float(match[1]) * _UNITS[unit])
        raise UsageError(
            f'save_every={value!r} is not understood; give a positive number of steps such as 50 or "50 steps", a time '
            'such as "10 minutes", "auto", or None'
        )


class Cost(msgspec.Struct, frozen=True):
    """What the save before took."""

    lost_s: float = PRIOR_COST
    """Of training."""
    total_s: float = 0.0
    """Until it was committed."""


class _Decision(msgspec.Struct, frozen=True):
    save: bool
    next_look: int


class Schedule:
    """Answers, on every rank alike, whether to save after a step. Training thread."""

    def __init__(
        self,
        policy: SavePolicy,
        coordinator: Coordinator,
        mtbf: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._coordinator = coordinator
        self._mtbf = mtbf
        self._clock = clock
        self._next_look = -1
        self._looked = (-1, clock())
        """Rank 0: the step and the time of the last look."""
        self._saved_at = clock()

    def due(self, step: int, cost: Cost, timeout: float) -> bool:
        """Whether to save after `step`. All ranks, after each step, each step once.

        At most steps it asks nobody; where rank 0 decides, others wait for it at most `timeout` seconds. Raises PeerLostError.
        """
        if self._policy.steps is not None:
            return step % self._policy.steps == 0
        if step < self._next_look:
            return False
        word = msgspec.msgpack.encode(self._decide(step, cost)) if self._coordinator.rank == 0 else None
        decision = msgspec.msgpack.decode(self._coordinator.agree(f"ckpt/due/{step}", word, timeout), type=_Decision)
        self._next_look = decision.next_look
        return decision.save

    def _decide(self, step: int, cost: Cost) -> _Decision:
        now, (looked_step, looked_at) = self._clock(), self._looked
        interval = self._policy.seconds or best_interval(cost, self._mtbf())
        known = looked_step >= 0
        gap = step - looked_step if known else 1
        pace = (now - looked_at) / gap
        save = now - self._saved_at + pace / 2 >= interval
        if save:
            self._saved_at = now
        self._looked = (step, now)
        left = min((interval - (now - self._saved_at)) / 2, _LONGEST_LOOK)
        ahead = int(left / pace) if known and pace > 0 else 1
        # At most twice as far as the last time: one quick step does not tell how long the next thousand take.
        return _Decision(save, step + max(1, min(ahead, 2 * gap)))


def best_interval(cost: Cost, mtbf: float) -> float:
    """Seconds between saves that lose the least (Daly 2006), and never so few that a save waits for the one before."""
    ratio = cost.lost_s / (2 * mtbf)
    daly = math.sqrt(2 * cost.lost_s * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost.lost_s if ratio < 1 else mtbf
    return max(daly, 2 * cost.total_s)


def observed_mtbf(directory: Path, now: Callable[[], float] = time.time) -> float:
    """Seconds between failures of the job in `directory`: its time so far over its attempts, leaning on the prior at first."""
    lives = attempts(directory)
    lived = max(0.0, now() - lives[0].started_at) if lives else 0.0
    return (PRIOR_MTBF + lived) / max(1, len(lives))
