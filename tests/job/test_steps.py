"""What counts as a step, and what is refused; one process, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import wbdist
from wbdist.checkpoint.manifest import committed


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)


def data(job: Any, samples: int = 40) -> Any:
    return job.loader(TensorDataset(torch.arange(samples, dtype=torch.float32)), batch_size=4)


def steps_of(directory: str = "ckpt") -> list[int]:
    return [manifest.step for manifest in committed(Path(directory))]


def test_break_counts_the_step_it_leaves() -> None:
    """Proves that `break` after a step's work keeps that step: the last checkpoint has it, and nothing is trained twice."""
    net = nn.Linear(1, 1)
    with wbdist.job(project="p", checkpoint_dir="ckpt") as job:
        loader = data(job)
        job.track(net=net, data=loader)
        for _ in job.steps(loader, epochs=1):
            if job.step == 2:
                break
        assert job.step == 2
        job.log({"after": 1.0})
        assert job.step == 3
    assert steps_of() == [3]


def test_a_failing_body_does_not_count() -> None:
    """Proves that a step whose body raised is not counted and not saved, although a generator cannot tell it from `break`."""
    net = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="body"), wbdist.job(project="p", checkpoint_dir="ckpt", save_every=2) as job:
        loader = data(job)
        job.track(net=net, data=loader)
        for _ in job.steps(loader, epochs=1):
            if job.step == 5:
                raise RuntimeError("the body failed")
    assert steps_of() == [4, 2]


def test_a_finished_job_started_again_trains_nothing() -> None:
    """Proves that the last state is saved at the end of the loop: starting again neither repeats nor loses a step."""
    seen = []
    for _ in range(2):
        net = nn.Linear(1, 1)
        with wbdist.job(project="p", checkpoint_dir="ckpt") as job:
            loader = data(job)
            job.track(net=net, data=loader)
            seen.append(len(list(job.steps(loader, epochs=2))))
            assert job.step == 20
    assert seen == [20, 0]


def test_more_epochs_continue_the_order() -> None:
    """Proves that a job asked for more epochs than before goes on with the next one."""
    order = []
    for epochs in (1, 3):
        with wbdist.job(project="p", checkpoint_dir="ckpt") as job:
            loader = data(job)
            job.track(net=nn.Linear(1, 1), data=loader)
            order += [batch[0].tolist() for batch in job.steps(loader, epochs=epochs)]
    with wbdist.job(project="p", checkpoint_dir="other") as job:
        loader = data(job)
        job.track(net=nn.Linear(1, 1), data=loader)
        assert order == [batch[0].tolist() for batch in job.steps(loader, epochs=3)]


@pytest.mark.parametrize("save_every", [0, -1, "50 parsecs", "often", True, 2.5])
def test_save_every_must_be_steps_or_a_time(save_every: Any) -> None:
    """Proves that what cannot be honoured is refused before anything starts, with what is allowed."""
    with pytest.raises(wbdist.UsageError, match=r"50 steps"):
        wbdist.job(project="p", checkpoint_dir="ckpt", save_every=save_every)


def test_save_every_needs_a_directory() -> None:
    """Proves that periodic saves without a place to save to are refused."""
    with pytest.raises(wbdist.UsageError, match="checkpoint_dir"):
        wbdist.job(project="p", save_every=10)


def test_unknown_strategy_is_refused() -> None:
    """Proves that a misspelt strategy lists the known ones."""
    with pytest.raises(wbdist.UsageError, match="auto, rank0, per_rank"):
        wbdist.job(project="p", strategy="rank_0")  # type: ignore[arg-type]


def test_steps_need_a_loader_with_a_position() -> None:
    """Proves that a plain DataLoader, whose position cannot be saved, is refused with the way to a resumable one."""
    with pytest.raises(wbdist.UsageError, match=r"job\.loader"), wbdist.job(project="p", checkpoint_dir="ckpt") as job:
        job.track(net=nn.Linear(1, 1))
        list(job.steps([1, 2, 3], epochs=1))  # type: ignore[arg-type]


def test_steps_before_track_are_refused() -> None:
    """Proves that forgetting track() is an error, not a job that silently cannot be resumed."""
    with pytest.raises(wbdist.UsageError, match=r"job\.track"), wbdist.job(project="p", checkpoint_dir="ckpt") as job:
        list(job.steps(data(job), epochs=1))


def test_a_job_works_without_a_directory() -> None:
    """Proves that tracking alone needs neither directory nor track()."""
    with wbdist.job(project="p") as job:
        assert len(list(job.steps(data(job), epochs=1))) == 10


def test_another_project_on_the_same_directory_is_refused() -> None:
    """Proves that two different jobs cannot mix their checkpoints by sharing a directory."""
    with wbdist.job(project="p", checkpoint_dir="ckpt"):
        pass
    with pytest.raises(wbdist.Error, match="belongs to project"), wbdist.job(project="q", checkpoint_dir="ckpt"):
        pass
