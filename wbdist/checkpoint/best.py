"""What "best" means: a metric, and whether low or high is good; and the best value that a job has seen."""

from __future__ import annotations

from math import isfinite
from typing import Self

import msgspec

from wbdist.errors import UsageError


class Goal(msgspec.Struct, frozen=True):
    metric: str
    highest: bool = False

    @classmethod
    def parse(cls, text: str, what: str) -> Self:
        """`loss` and `min:loss`: the lowest; `max:accuracy`: the highest. Raises UsageError."""
        mode, colon, name = text.partition(":")
        goal = cls(name, mode == "max") if colon and mode in {"min", "max"} else cls(text)
        if not goal.metric:
            raise UsageError(f"{what}={text!r}: give a metric's name, 'min:<name>' or 'max:<name>'")
        return goal

    def __str__(self) -> str:
        return f"{'max' if self.highest else 'min'}:{self.metric}"

    def cost(self, value: float) -> float:
        """The lower the better."""
        return -value if self.highest else value

    def better(self, value: float, than: float | None) -> bool:
        """What is not finite is never better; anything finite is better than nothing."""
        return isfinite(value) and (than is None or self.cost(value) < self.cost(than))


class Best(msgspec.Struct, frozen=True):
    """The best value so far, and the step after which it was saved."""

    goal: str
    value: float
    step: int
