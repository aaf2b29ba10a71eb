"""`save_best`: whether a step brought the best value yet of a metric, answered alike on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum
from typing import Any

import msgspec

from wbdist.checkpoint.best import Best, Goal
from wbdist.core.coordination import Coordinator
from wbdist.errors import PeerLostError


class BestWatch:
    """Hears what a rank logs of the metric. Ranks meet in the steps in which they log it, and in no other."""

    def __init__(self, goal: Goal, peers: Coordinator, known: Best | None) -> None:
        """`known`: of the checkpoint that this job goes on from."""
        self._goal = goal
        self._peers = peers
        self._best = known if known is not None and known.goal == str(goal) else None
        self._heard: float | None = None

    def hear(self, data: Mapping[str, Any]) -> None:
        """Any rank, training thread: a row's values, before they are reduced. A value on a device is waited for."""
        if self._goal.metric in data:
            self._heard = float(data[self._goal.metric])

    def improved(self, step: int, timeout: float) -> bool:
        """All ranks, after each step: whether the mean of what they logged in it is better than any before.

        Blocks, where something was logged, until all ranks have said theirs, at most `timeout` seconds. Raises PeerLostError.
        """
        heard, self._heard = self._heard, None
        if heard is None:
            return False
        values = [heard]
        if self._peers.world_size > 1:
            try:
                words = self._peers.gather(f"job/best/{step}", msgspec.msgpack.encode(heard), timeout)
            except PeerLostError as error:
                metric = self._goal.metric
                raise PeerLostError(
                    f"{error}. save_best={metric!r} needs every rank to log {metric!r} in the same steps"
                ) from error
            values = [msgspec.msgpack.decode(word, type=float) for word in words]
        value = fsum(values) / len(values)
        if not self._goal.better(value, None if self._best is None else self._best.value):
            return False
        self._best = Best(str(self._goal), value, step)
        return True

    def saved_with(self, step: int, *, is_the_best: bool) -> Best | None:
        """The best so far, for the checkpoint of `step`: that very one, where the save is for its sake."""
        if is_the_best and self._best is not None:
            # Within a group of batches the save comes some steps later.
            self._best = msgspec.structs.replace(self._best, step=step)
        return self._best
