"""Ranks that were given different strategies, or other arguments by which they would not meet."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import ThreadCoordinator, run_ranks

import wbdist
from wbdist.distributed import coordination, ranks
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.same_arguments import check_same
from wbdist.errors import UsageError
from wbdist.job import handle, one_open
from wbdist.run import lifecycle


def identity_of(peers: ThreadCoordinator) -> RankIdentity:
    return RankIdentity(rank=peers.rank, world_size=peers.world_size, local_rank=peers.rank, source="test")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([("rank0", "online"), ("rank0", "offline")], ""),
        ([("auto", "online"), ("rank0", "online")], ""),
        ([("auto", "disabled"), ("per_rank", "disabled")], ""),
        ([("rank0", "online"), ("per_rank", "online")], "rank 0 came with strategy='rank0', rank 1 with strategy='per_rank': "),
        (
            [("shared", "online"), ("auto", "online"), ("shared", "online"), ("auto", "online")],
            "ranks 0, 2 came with strategy='shared', ranks 1, 3 with strategy='auto': ",
        ),
        ([("auto", "online"), ("auto", "disabled")], "rank 0 came with mode='online', rank 1 with mode='disabled': "),
        ([("auto", "online"), ("mean", "online")], "rank 1: strategy='mean' is not known; choose one of: auto, "),
    ],
)
def test_all_ranks_are_told_who_was_given_what(given: list[tuple[str, str]], said: str) -> None:
    """Proves that ranks which mean the same pass, and that else every rank has one and the same error."""

    def rank(peers: ThreadCoordinator) -> None:
        strategy, mode = given[peers.rank]
        check_same(peers, "same", identity_of(peers), 60, strategy=strategy, mode=mode)

    outcomes = run_ranks(len(given), rank)
    if not said:
        assert outcomes == [None] * len(given)
    else:
        assert all(type(outcome) is UsageError and str(outcome).startswith(said) for outcome in outcomes), outcomes
        assert len(set(map(str, outcomes))) == 1


def test_alone_nobody_is_asked() -> None:
    def rank(peers: ThreadCoordinator) -> list[str]:
        check_same(peers, "same", identity_of(peers), 60, strategy="rank0", mode="online")
        return list(peers.board.values)

    assert run_ranks(1, rank) == [[]]


def start_ranks(strategy: list[str]) -> Callable[[int], Any]:
    return lambda rank: wbdist.init_ranks(project="p", strategy=strategy[rank], id="x")  # type: ignore[arg-type]


def enter_jobs(**each: list[Any]) -> Callable[[int], Any]:
    def enter(rank: int) -> Any:
        given = {"checkpoint_dir": "ck", **{name: values[rank] for name, values in each.items()}}
        return wbdist.job(project="p", id="x", notices="off", **given).__enter__()

    return enter


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (start_ranks(["rank0", "per_rank"]), "strategy='rank0', rank 1 with strategy='per_rank'"),
        (enter_jobs(strategy=["per_rank", "auto"]), "strategy='per_rank', rank 1 with strategy='auto'"),
        (enter_jobs(checkpoint_dir=["ck", None]), r"checkpoint_dir=\.\.\., rank 1 with checkpoint_dir=None"),
        (
            enter_jobs(save_every=[50, 100], save_best=["loss", None]),
            "save_every=50, save_best=min:loss, rank 1 with .*=100, .*None",
        ),
    ],
)
def test_nothing_is_opened_then(
    start: Callable[[int], Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that init_ranks and jobs ask before any rank opens, claims or writes anything, and wait for nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = threading.local()
    for module in (ranks, handle):
        monkeypatch.setattr(module, "detect", lambda: identity_of(own.peers))
    monkeypatch.setattr(coordination, "connect", lambda *_, **__: own.peers)
    monkeypatch.setattr(ranks, "_opened", itertools.repeat(0))
    monkeypatch.setattr(one_open, "take", lambda _which: None)  # here ranks are threads of one process
    before = sorted(tmp_path.rglob("*"))

    def rank(peers: ThreadCoordinator) -> None:
        own.peers = peers
        start(peers.rank)

    for outcome in run_ranks(2, rank, 30):
        with pytest.raises(UsageError, match=f"rank 0 came with {said}"):
            raise outcome
    assert (sorted(tmp_path.rglob("*")), lifecycle.active_runs()) == (before, [])
