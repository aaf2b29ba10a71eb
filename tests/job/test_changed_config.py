"""A job that is started again with another config; one process, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import wbdist


def run(steps: int, config: dict[str, Any], **said: Any) -> int:
    """Trains two steps more than the checkpoint has, at most to `steps`; the step it began with."""
    with wbdist.job(project="p", checkpoint_dir="ckpt", mode="offline", config=config, **said) as job:
        net, data = nn.Linear(1, 1), job.loader(TensorDataset(torch.arange(40.0)), batch_size=4)
        job.track(net=net, data=data)
        began = job.step
        for _ in job.steps(data, epochs=1):
            if job.step == steps - 1:
                break
    return began


def test_a_config_that_is_set_after_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script sets before its loop must be what it set before; what it sets within may come later, or never."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)

    def life(before: dict[str, Any], within: dict[str, Any], **said: Any) -> int:
        with wbdist.job(project="p", checkpoint_dir="ckpt", mode="offline", config={"lr": 0.1}, **said) as job:
            net, data = nn.Linear(1, 1), job.loader(TensorDataset(torch.arange(40.0)), batch_size=4)
            job.track(net=net, data=data)
            job.config.update(before, allow_val_change=True)
            began = job.step
            for _ in job.steps(data, epochs=1):
                job.config.update(within, allow_val_change=True)
                break
        return began

    first = {"model": {"depth": 2, "width": 3}, "lr": 0.5, "data_dir": "/scratch/1"}
    assert life(first, {"frozen": True}) == 0
    assert life({**first, "data_dir": "/scratch/2"}, {"frozen": False}) == 1
    with pytest.raises(wbdist.ConfigError, match=r"step-2\.a2 .* another: lr 0\.5 -> 0\.6, model\.depth 2 -> 4\. ") as caught:
        life({"model": {"depth": 4, "width": 3}, "lr": 0.6}, {})
    assert caught.value.exit_code == 65
    assert life({"model": {"depth": 4}}, {}, config_changes=["model"]) == 2
    assert life({"model": {"depth": 4}, "new": 1}, {}) == 3


def test_a_job_with_another_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that exits with "do not retry", unless the change is meant: by argument or variable, until the next save."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    first = {"lr": 0.1, "epochs": 1, "data_dir": "/scratch/1"}
    assert run(2, first) == 0
    assert run(3, {**first, "data_dir": "/scratch/2"}) == 2
    with pytest.raises(wbdist.ConfigError, match=r"step-3\.a2 was made with another config: lr 0\.1 -> 0\.2\. ") as caught:
        run(4, {**first, "lr": 0.2})
    assert caught.value.exit_code == 65
    assert run(4, {**first, "lr": 0.2}, config_changes=["lr"]) == 3
    assert run(5, {**first, "lr": 0.2}) == 4
    monkeypatch.setenv("WBDIST_CONFIG_CHANGES", "lr,epochs")
    assert run(6, {**first, "lr": 0.3, "epochs": 2}) == 5
    with pytest.raises(wbdist.UsageError, match="config_changes"):
        run(7, first, config_changes="allow,lr")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(wbdist.ConfigError, match="environment: deterministic False -> True"):
            run(7, first, config_changes="allow")
        assert run(7, first, config_changes="allow", environment_changes=["deterministic"]) == 6
    finally:
        torch.use_deterministic_algorithms(False)
