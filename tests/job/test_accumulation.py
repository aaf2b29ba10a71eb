"""Several batches to one optimizer step: where a job saves and stops then; one process, offline."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.waiting import until
from torch import nn
from torch.utils.data import TensorDataset

import wbdist
from wbdist.checkpoint.manifest import committed
from wbdist.job.ending import Preempted


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)


def job(**said: Any) -> wbdist.Job:
    return wbdist.job(project="p", checkpoint_dir="ckpt", notices="off", **said)


def data(job: wbdist.Job) -> Any:
    """Seven batches an epoch."""
    loader = job.loader(TensorDataset(torch.arange(28.0)), batch_size=4)
    job.track(net=nn.Linear(1, 1), data=loader)
    return loader


def saved() -> list[int]:
    return sorted(manifest.step for manifest in committed(Path("ckpt")))


def test_saves_wait_for_the_optimizer_step() -> None:
    """The last group of an epoch ends with it; a save that is due within a group comes at its end."""
    with job(save_every=2, keep_last=9) as one:
        seen = [one.accumulating for _ in one.steps(data(one), epochs=2, accumulate=3)]
        assert not one.accumulating
    assert seen == [True, True, False, True, True, False, False] * 2
    assert saved() == [3, 6, 10, 13, 14]


def test_stops_wait_for_the_optimizer_step() -> None:
    """A notice within a group is answered after it, and the next attempt goes on with the group that comes then."""
    steps = []
    with pytest.raises(Preempted) as left, job() as one:
        for _ in one.steps(data(one), epochs=1, accumulate=3):
            steps.append(one.step)
            if one.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: one.notice, "the notice")
    assert left.value.code == 75
    assert steps == [0, 1, 2, 3, 4, 5]
    assert saved() == [6]
    with job() as one:
        assert [(one.step, one.accumulating) for _ in one.steps(data(one), epochs=1, accumulate=3)] == [(6, False)]


def test_a_loop_left_within_a_group(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is saved of it, which is said; asking for it is an error."""
    with job(save_every=2) as one:
        for _ in one.steps(data(one), epochs=1, accumulate=2):
            if one.step == 4:
                break
        with pytest.raises(wbdist.UsageError, match=r"step 5 is no place to save: .* job\.accumulating is False"):
            one.save()
    assert saved() == [2, 4]
    assert "the last save was of step 4" in capfd.readouterr().err


@pytest.mark.parametrize("accumulate", [0, -1, True, 1.5, "2"])
def test_what_is_no_number_of_batches(accumulate: Any) -> None:
    """Refused before the first batch."""
    with pytest.raises(wbdist.UsageError, match="accumulate="), job() as one:
        next(one.steps(data(one), epochs=1, accumulate=accumulate))
