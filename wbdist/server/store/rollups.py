"""A long metric in few numbers: blocks of consecutive values, and the buckets of a chart made of them.

A block of WIDTH values holds what a chart needs of them; a chart of a million steps then reads 8000 blocks, not a million
values. Values are blocks of one each, so one function makes buckets of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import zstandard

from wbdist.server.store.columns import Floats, Ints
from wbdist.server.store.interface import Bucket

WIDTH = 128


class Blocks(NamedTuple):
    """Arrays of equal length, one entry a block."""

    lo: Ints
    """First and last step."""
    hi: Ints
    n: Ints
    """Values."""
    real: Ints
    """Values that are not NaN; the next three are over these."""
    min: Floats
    max: Floats
    sum: Floats
    last: Floats

    @property
    def total(self) -> int:
        """Values in all blocks."""
        return int(self.n.sum())

    def pack(self) -> bytes:
        return zstandard.compress(b"".join(part.tobytes() for part in self), 1)

    @classmethod
    def unpack(cls, blob: bytes) -> Blocks:
        raw = np.frombuffer(zstandard.decompress(blob), dtype=np.int64).reshape(len(cls._fields), -1)
        return cls(*raw[:4], *raw[4:].view(np.float64))

    @classmethod
    def of_values(cls, steps: Ints, values: Floats) -> Blocks:
        """One block a value."""
        real = ~np.isnan(values)
        ones = np.ones(len(steps), dtype=np.int64)
        return cls(steps, steps, ones, real.astype(np.int64), values, values, np.where(real, values, 0.0), values)

    @classmethod
    def join(cls, parts: Sequence[Blocks]) -> Blocks:
        """At least one."""
        return parts[0] if len(parts) == 1 else cls(*map(np.concatenate, zip(*parts, strict=True)))

    def grouped(self, starts: Ints) -> Blocks:
        """Larger blocks, of those from each of `starts` to the next; not of none."""
        last = self.last[np.append(starts[1:], len(self.lo)) - 1]
        with np.errstate(invalid="ignore", over="ignore"):
            return Blocks(
                np.minimum.reduceat(self.lo, starts),
                np.maximum.reduceat(self.hi, starts),
                np.add.reduceat(self.n, starts),
                np.add.reduceat(self.real, starts),
                np.fmin.reduceat(self.min, starts),
                np.fmax.reduceat(self.max, starts),
                np.add.reduceat(self.sum, starts),
                last,
            )

    def in_order(self) -> tuple[Blocks, bool]:
        """The same by step (equal steps stay in their order), and whether no two overlap."""
        found = self
        if np.any(self.lo[1:] < self.lo[:-1]):
            order = np.argsort(self.lo, kind="stable")
            found = Blocks(*map(itemgetter(order), self))
        return found, not np.any(found.hi[:-1] > found.lo[1:])


NONE = Blocks.of_values(np.zeros(0, dtype=np.int64), np.zeros(0))


def rollup(steps: Ints, values: Floats) -> Blocks:
    """Blocks of WIDTH consecutive values (the last may be shorter)."""
    return Blocks.of_values(steps, values).grouped(np.arange(0, len(steps), WIDTH)) if len(steps) else NONE


def bucketed(found: Blocks, buckets: int) -> list[Bucket]:
    """At most `buckets` buckets of about equal width in steps, of blocks in order; one a value when there are few enough."""
    if len(found.lo) == 0:
        return []
    if found.total > buckets:
        low, high = int(found.lo[0]), int(found.lo[-1])
        which = ((found.lo - low).astype(np.float64) * (buckets / (high - low + 1))).astype(np.int64)
        which = np.minimum(which, buckets - 1)  # float rounding at the upper end
        found = found.grouped(np.flatnonzero(np.append(True, which[1:] != which[:-1])))
    mean = np.where(found.real > 0, found.sum / np.maximum(found.real, 1), np.nan)
    columns = (found.lo, found.hi, found.n, found.min, found.max, mean, found.last)
    return [Bucket(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
