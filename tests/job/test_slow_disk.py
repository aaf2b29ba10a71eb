"""A state that takes longer to write than ranks wait for each other at the start; one process, offline."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import wbdist
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import committed
from wbdist.job import handle, saving


def test_a_save_may_take_longer_than_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves that are waited for (each by the next, by `save`, by the end) have the time that a big state needs."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "PEER_TIMEOUT", 0.02)
    monkeypatch.setattr(handle, "PEER_TIMEOUT", 0.02)
    monkeypatch.setattr(FileLayer, "sync_file", lambda self, fd: time.sleep(0.1))
    with wbdist.job(project="p", checkpoint_dir="ckpt", save_every=1, keep_last=9, mode="disabled") as job:
        net, data = nn.Linear(1, 1), job.loader(TensorDataset(torch.arange(12.0)), batch_size=4)
        job.track(net=net, data=data)
        for _ in job.steps(data, epochs=1):
            job.log({"a": 1})
        job.save()
    assert [manifest.step for manifest in committed("ckpt")] == [3, 2, 1]
