"""Whether all ranks loop over the same data.

Ranks whose loaders differ take different numbers of steps, and the first to be through waits for the others, who wait for it in
their next collective: for half an hour, and nothing says why. So rank 0 says what it loops over, and the others compare. Nobody
waits for that: what is not there yet is looked for again after the next step, and after a step with a collective it is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wbdist.core.coordination import Coordinator
from wbdist.errors import UsageError

if TYPE_CHECKING:
    from wbdist.hooks.sampler import ResumableSampler


class SameData:
    """One loop's; made on all ranks, for the same loop in turn."""

    def __init__(self, peers: Coordinator, loop: int, sampler: ResumableSampler, epochs: int, accumulate: int) -> None:
        self._peers = peers
        self._key = f"job/loop/{loop}"
        self._own = (
            f"{sampler.length} samples, batch_size={sampler.batch_size}, seed={sampler.seed}, shuffle={sampler.shuffle}, "
            f"tail={sampler.tail!r}, epochs={epochs}, accumulate={accumulate}"
        )
        self.known = peers.world_size == 1
        """There is nothing to be found out any more."""
        if peers.rank == 0 and not self.known:
            peers.put(self._key, self._own.encode())
            self.known = True

    def check(self) -> None:
        """Any rank, not in step, never waits. Raises UsageError when this rank's loop is known to be another than rank 0's."""
        told = None if self.known else self._peers.peek(self._key)
        if told is None:
            return
        self.known = True
        if (rank0s := told.decode()) != self._own:
            raise UsageError(
                f"job.steps() loops over other data on rank {self._peers.rank} than on rank 0, so that they would not take the "
                f"same steps.\n  rank 0: {rank0s}\n  rank {self._peers.rank}: {self._own}\n"
                "Give job.loader() the same dataset and arguments on all ranks: it gives each its share. Ranks that have "
                "different amounts of work loop over it inside a step, under torch's Join: docs/ranks.md, 'Uneven data'"
            )
