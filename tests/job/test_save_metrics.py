"""What saves cost is kept with the run, beside its history; one process, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.journals import records_of
from torch import nn
from torch.utils.data import TensorDataset

import wbdist
from wbdist.checkpoint.manifest import committed
from wbdist.run.journal import Kind, find_journals


def measured(directory: Path) -> list[dict[str, Any]]:
    found = []
    for path in find_journals(directory / "wandb"):
        found += records_of(path, Kind.STATS)
    return [sample for sample in found if any(name.startswith("system.checkpoint.") for name in sample)]


def train(directory: Path, mode: Literal["offline", "disabled"]) -> None:
    store = (directory / "store").as_uri()
    with wbdist.job(project="p", checkpoint_dir="ckpt", checkpoint_copy=store, save_every=3, mode=mode) as job:
        net, data = nn.Linear(1, 1), job.loader(TensorDataset(torch.arange(28.0)), batch_size=4)
        job.track(net=net, data=data)
        for _ in job.steps(data, epochs=1):
            job.log({"a": 1})


def test_each_save_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stall, wait, time and bytes of each save at each place, under names of system metrics; nothing in disabled mode."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    for mode in ("disabled", "offline"):
        (tmp_path / mode).mkdir()
        monkeypatch.chdir(tmp_path / mode)
        train(tmp_path / mode, mode)
    assert measured(tmp_path / "disabled") == []
    samples = measured(tmp_path / "offline")
    saves = [sample for sample in samples if "system.checkpoint.step" in sample]
    assert [sample["system.checkpoint.step"] for sample in saves] == [3, 6, 7]
    newest = committed(tmp_path / "offline" / "ckpt")[0]
    assert {name.removeprefix("system.checkpoint.") for name in saves[-1]} == {
        "step",
        "stall_s",
        "waited_s",
        "disk.write_s",
        "disk.bytes",
    }
    # No history travels in this number, which was in the checkpoint after the rank had written its own part.
    assert 0 < saves[-1]["system.checkpoint.disk.bytes"] <= newest.bytes
    assert all(value >= 0 for sample in samples for value in sample.values())
    copies = [sample for sample in samples if "system.checkpoint.store.step" in sample]
    assert copies
    assert set(copies[0]) == {f"system.checkpoint.store.{name}" for name in ("step", "write_s", "bytes")}
