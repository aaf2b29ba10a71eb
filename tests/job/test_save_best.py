"""Saving when a metric is better than ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import ThreadCoordinator, alone, run_ranks
from support.training import position
from torch import nn
from torch.utils.data import TensorDataset

import wbdist
from wbdist.checkpoint.best import Best, Goal
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.manifest import committed
from wbdist.errors import PeerLostError
from wbdist.job.best import BestWatch

ACCURACY = {2: 0.5, 4: 0.7, 6: 0.6, 8: float("nan"), 9: 0.9, 12: 0.8}
"""By the step that logs it, from 0."""


def train(until: int, **said: Any) -> int:
    """One attempt over 14 batches, which fails after `until`; the step that it began with."""
    began = -1
    try:
        with wbdist.job(
            project="p", checkpoint_dir="ckpt", mode="offline", save_best="max:accuracy", keep_last=1, **said
        ) as job:
            net, data = nn.Linear(1, 1), job.loader(TensorDataset(torch.arange(28.0)), batch_size=2)
            job.track(net=net, data=data)
            began = job.step
            for _ in job.steps(data, epochs=1):
                job.log({"loss": 1.0})
                if job.step in ACCURACY:
                    job.log({"accuracy": torch.tensor(ACCURACY[job.step], dtype=torch.float64)})
                if job.step == until:
                    raise RuntimeError("killed")
    except RuntimeError:
        pass
    return began


def saved() -> list[tuple[int, str]]:
    return sorted((manifest.step, manifest.reason) for manifest in committed(Path("ckpt")))


def test_saved_when_better_than_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each improvement is saved after its step and the best stays, also beside newer ones whose summary tells the same value;
    the next attempt knows what the best was. NaN is never better."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    assert train(until=3) == 0
    assert saved() == [(3, "best")]
    assert train(until=7, save_every=1) == 3
    assert saved() == [(3, "best"), (5, "best"), (7, "interval")]  # 3: what it started from
    assert committed(Path("ckpt"))[0].best == Best("max:accuracy", 0.7, 5)
    assert train(until=8) == 7  # 0.6 and NaN
    assert saved() == [(3, "best"), (5, "best"), (7, "interval")]
    assert train(until=99) == 7
    assert saved() == [(7, "interval"), (10, "best"), (14, "end")]


def test_within_a_group_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save that an improvement asks for comes with the optimizer step, and is the best's."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    with wbdist.job(project="p", checkpoint_dir="ckpt", mode="offline", save_best="loss", keep_last=1) as job:
        net, data = nn.Linear(1, 1), job.loader(TensorDataset(torch.arange(28.0)), batch_size=2)
        job.track(net=net, data=data)
        for _ in job.steps(data, epochs=1, accumulate=4):
            job.log({"loss": float(job.step == 0) + (job.step > 4)})
    assert saved() == [(4, "best"), (14, "end")]
    assert committed(Path("ckpt"))[1].best == Best("min:loss", 0.0, 4)


def test_ranks_answer_alike() -> None:
    """By the mean of their values; steps in which nobody logs it cost nothing; a rank that never logs it is named."""

    def rank(peers: ThreadCoordinator) -> list[bool]:
        watch = BestWatch(Goal.parse("loss", ""), peers, None)
        answers = []
        for step, values in enumerate([(1.0, 3.0), None, (2.5, 1.0), (0.0, 4.0), (1.0, 0.5)]):
            if values is not None:
                watch.hear({"other": 1, "loss": values[peers.rank]})
            answers.append(watch.improved(step, 20))
        return answers

    assert run_ranks(2, rank) == [[True, False, True, False, True]] * 2

    def lonely(peers: ThreadCoordinator) -> bool:
        watch = BestWatch(Goal.parse("loss", ""), peers, None)
        if peers.rank == 0:
            watch.hear({"loss": 1.0})
        return watch.improved(1, 0.05)

    lost, other = run_ranks(2, lonely)
    assert isinstance(lost, PeerLostError)
    assert "ranks [1]" in str(lost)
    assert "needs every rank to log 'loss'" in str(lost)
    assert other is False


def test_the_best_known_is_the_goals_own(tmp_path: Path) -> None:
    """A checkpoint made for another goal says nothing of this one."""
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.save(1, position(1), block=True, timeout=20, best=Best("min:loss", 0.1, 1))
    known = committed(tmp_path)[0].best
    for text, improves in (("loss", False), ("max:loss", True), ("error", True)):
        watch = BestWatch(Goal.parse(text, ""), alone(), known)
        watch.hear({"loss": 0.5, "error": 0.5})
        assert watch.improved(2, 1) == improves


def test_what_cannot_be_saved_by() -> None:
    """Refused when the job is made."""
    for said in ({"save_best": "max:", "checkpoint_dir": "c"}, {"save_best": "loss"}):
        with pytest.raises(wbdist.UsageError, match="save_best="):
            wbdist.job(project="p", **said)
