"""State on CUDA devices: copied on a stream of its own while training goes on. Skipped where there is no device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import alone
from support.training import position
from torch import nn

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.manifest import committed, verify

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    yield
    torch.cuda.synchronize()


class Training:
    """Mixed precision with a scaler; dropout draws from the device's generator."""

    def __init__(self, directory: Path, attempt: int) -> None:
        torch.manual_seed(attempt)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Dropout(0.3), nn.Linear(256, 8)).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0, growth_interval=3)
        self.data = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        self.checkpoints = Checkpointer(directory, alone(), attempt=attempt, keep_last=9)
        self.checkpoints.track(model=self.model, optimizer=self.optimizer, scaler=self.scaler)
        restored = self.checkpoints.restore(timeout=60)
        self.step = 0 if restored is None else restored.step
        self.losses: dict[int, str] = {}

    def train(self, steps: int) -> None:
        """Saves in the background after every step."""
        while self.step < steps:
            self.optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = self.model(self.data).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            self.losses[self.step] = loss.item().hex()
            self.checkpoints.save(self.step, position(self.step))
        self.checkpoints.close()

    def bits(self) -> dict[str, Any]:
        states = {**self.model.state_dict(), **self.optimizer.state_dict()["state"][0]}
        found = {name: value.cpu().numpy().tobytes().hex() for name, value in states.items()}
        return {**found, "scaler": self.scaler.state_dict(), "generator": float(torch.rand((), device=DEVICE))}


def test_training_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """From each of its steps, with weights, moments, scaler and generator of the device."""
    whole = Training(tmp_path / "whole", 1)
    whole.train(6)
    expected = whole.bits()
    for step in range(1, 6):
        directory = tmp_path / str(step)
        Training(directory, 1).train(step)
        resumed = Training(directory, 2)
        assert resumed.step == step
        resumed.train(6)
        assert resumed.losses == {number: loss for number, loss in whole.losses.items() if number > step}
        assert resumed.bits() == expected


def test_later_kernels_do_not_reach_what_is_saved(tmp_path: Path) -> None:
    """Each file holds the values of its step, although the tensor is overwritten as soon as `save` returns; the pinned
    memory is one region from save to save."""
    weights = nn.Parameter(torch.zeros(64 << 20, device=DEVICE))
    model = nn.ParameterDict({"w": weights})
    regions = set()
    with Checkpointer(tmp_path, alone(), attempt=1, keep_last=9) as checkpoints:
        checkpoints.track(model=model)
        with torch.no_grad():
            for step in range(1, 5):
                weights.fill_(step)
                checkpoints.save(step, position(step))
                weights.fill_(-1)
                memory = checkpoints._arena._memory
                assert memory is not None
                assert memory.is_pinned()
                regions.add(memory.data_ptr())
    assert len(regions) == 1
    for manifest in committed(tmp_path):
        verify(manifest)
    for step in (4, 3, 2, 1):
        with Checkpointer(tmp_path, alone(), attempt=2) as checkpoints:
            checkpoints.track(model=model)
            restored = checkpoints.restore(timeout=60)
            assert restored is not None
            assert restored.step == step
            assert weights.min().item() == weights.max().item() == step
        (tmp_path / f"step-{step}.a1").rename(tmp_path / f"seen-{step}")


def test_the_generators_of_all_devices(tmp_path: Path) -> None:
    """Each device goes on drawing as it would have."""
    devices = range(torch.cuda.device_count())
    torch.cuda.manual_seed_all(7)
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.save(1, position(1), block=True)
    drawn = [torch.rand(8, device=device).tolist() for device in devices]
    torch.cuda.manual_seed_all(8)
    with Checkpointer(tmp_path, alone(), attempt=2) as checkpoints:
        assert checkpoints.restore(timeout=60) is not None
    assert [torch.rand(8, device=device).tolist() for device in devices] == drawn
