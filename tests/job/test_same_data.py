"""Ranks that loop over other data than rank 0 are refused before they would wait for each other."""

from __future__ import annotations

from support.ranks import ThreadCoordinator, run_ranks

from wbdist.errors import UsageError
from wbdist.hooks.sampler import ResumableSampler
from wbdist.job.same_data import SameData


def test_who_differs_from_rank_0_is_told_what_differs() -> None:
    """Proves that nobody waits for rank 0, that each difference is seen once rank 0 has said what it loops over, and that ranks
    that are alike, and later loops, are let through."""

    def act(peers: ThreadCoordinator) -> None:
        rank = peers.rank

        def same(loop: int, batch_size: int, epochs: int) -> SameData:
            return SameData(peers, loop, ResumableSampler(64, batch_size, rank=rank, world_size=4), epochs, 1)

        if rank:
            early = same(1, 8, 2)
            early.check()
            assert not early.known
        peers.barrier("asked before rank 0 came", 30)
        if rank == 0:
            same(1, 8, 2)
        peers.barrier("rank 0 came", 30)
        if rank:
            early.check()
            assert early.known
        same(2, 4 if rank == 2 else 8, 3 if rank == 3 else 2)
        peers.barrier("second loop", 30)
        same(2, 4 if rank == 2 else 8, 3 if rank == 3 else 2).check()

    first, second, third, fourth = run_ranks(4, act)
    assert (first, second) == (None, None)
    for error, own in ((third, "batch_size=4, seed=0, shuffle=True, tail='drop', epochs=2"), (fourth, "epochs=3")):
        assert isinstance(error, UsageError)
        assert "rank 0: 64 samples, batch_size=8, seed=0, shuffle=True, tail='drop', epochs=2" in str(error)
        assert own in str(error).partition("rank 0: ")[2].partition("\n")[2]
