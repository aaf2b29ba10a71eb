"""Which steps are complete: rows of many ranks in, whole steps out, in order. Pure.

A rank has *passed* step s when it can add nothing more to s: it closed a row of s, or touched a later step. A step is
complete when every rank that is still with us passed it. Ranks may be apart by any number of steps; what is held is the
skew between them. A rank that ended or was lost holds nobody up.

Rejected as what everybody gets: closing a step after some time. The row then depends on how busy a machine was, and a job
that was killed and resumed does not have the history of one that was not. Who asks for it (`distributed/lateness.py`) has it by
`close_below`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

FOREVER = (1 << 63) - 1


class RankRow(Protocol):
    @property
    def rank(self) -> int: ...


R = TypeVar("R", bound=RankRow)


class StepAligner(Generic[R]):
    """Rows of `world_size` ranks, from `starting_step` on."""

    def __init__(self, world_size: int, starting_step: int) -> None:
        self._next = [starting_step] * world_size
        """For each rank the lowest step it may still add to."""
        self._rows: dict[int, list[R]] = {}
        self._steps: list[int] = []
        """Heap of the keys of `_rows`."""
        self._closed = starting_step
        self._forced = starting_step
        """Steps below this do not wait for anybody."""
        self._replayed = starting_step
        self.late = [0] * world_size
        """For each rank the rows that came when their step had been given out without them."""

    @property
    def frontier(self) -> int:
        """Every step below this is complete, or is not waited for."""
        return max(min(self._next), self._forced)

    def next_of(self, rank: int) -> int:
        """The lowest step that `rank` may still add to."""
        return self._next[rank]

    def add(self, step: int, row: R) -> None:
        """A finished row; its rank has passed its step. Rows of steps that were complete before are ignored (a replay)."""
        self.put(step, row)
        if step >= self._next[row.rank]:
            self._next[row.rank] = step + 1

    def put(self, step: int, row: R) -> None:
        """As `add`, for who says afterwards, for many rows at once, what their rank has passed."""
        if step >= self._closed:
            entries = self._rows.get(step)
            if entries is None:
                self._rows[step] = [row]
                heapq.heappush(self._steps, step)
            else:
                entries.append(row)
        elif step >= self._replayed:
            self.late[row.rank] += 1

    def passed(self, rank: int, step: int) -> None:
        """The rank will add to `step` at the lowest."""
        if step > self._next[rank]:  # noqa: PLR1730  (a third of the time, in the aggregator's hot loop)
            self._next[rank] = step

    def leave(self, rank: int) -> None:
        """The rank ended or is lost: it adds nothing more."""
        self._next[rank] = FOREVER

    def skip_to(self, step: int) -> None:
        """Steps below `step` were given out before (by a predecessor)."""
        self._closed = self._replayed = max(self._closed, step)

    def passed_by(self, count: Callable[[int], int]) -> int:
        """The step below which so many of the ranks that are still with us have passed all; `count` says how many, of all."""
        here = sorted((step for step in self._next if step != FOREVER), reverse=True)
        return here[count(len(here)) - 1] if here else 0

    def close_below(self, step: int) -> None:
        """Steps below `step` wait for nobody any more."""
        self._forced = max(self._forced, step)

    def complete(self) -> Iterator[tuple[int, list[R]]]:
        """Steps that became complete, lowest first, each with its rows in rank order."""
        frontier = self.frontier
        while self._steps and self._steps[0] < frontier:
            step = heapq.heappop(self._steps)
            entries = self._rows.pop(step)
            entries.sort(key=_rank_of)
            self._closed = step + 1
            yield step, entries


_rank_of = attrgetter("rank")
