"""When a step of many ranks is written without the last of them."""

from __future__ import annotations

import math

import msgspec

from wbdist.errors import UsageError


class LatePolicy(msgspec.Struct, frozen=True):
    """A step whose row `quorum` ranks have completed is written `patience` seconds later, without those that are late.

    What a late rank logs for that step stays in its own journal and is not in the run; how many rows that were is said. So
    the row then depends on who was slow, and a resumed job may not repeat it bit for bit: without a policy a step waits for
    every rank that lives, as long as it takes.
    """

    quorum: int | float
    """Of the ranks: a number (3), or a share (0.75, rounded up). Ranks that have ended or died do not count."""
    patience: float
    """Seconds."""

    def __post_init__(self) -> None:
        share = isinstance(self.quorum, float)
        if isinstance(self.quorum, bool) or not (0 < self.quorum <= 1 if share else self.quorum >= 1):
            raise UsageError(f"quorum={self.quorum!r}: give a number of ranks from 1, or a share above 0 and up to 1.0")
        if not 0 <= self.patience < math.inf:
            raise UsageError(f"patience={self.patience!r}: give seconds, 0 or more")

    def ranks(self, size: int) -> int:
        """How many of `size` ranks are the quorum."""
        return min(size, self.quorum if isinstance(self.quorum, int) else math.ceil(self.quorum * size))
