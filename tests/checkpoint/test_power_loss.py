"""Power fails at any moment of a save: what was not synced is lost, and the newest checkpoint that the disk has is whole.

Two disks, each the worst of its kind: one that has nothing but what was synced, names as well as contents; and one that
has every name at once, but of the contents what was synced only.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dying import CALLS
from support.ranks import alone
from support.training import position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import committed, verify
from wbdist.errors import CheckpointCorruptError


class Disk(FileLayer):
    """Remembers, beside the real directory, what of it would outlast a power failure; takes a copy of that after every call."""

    def __init__(self, root: Path, copies: Path) -> None:
        self.root = root
        self.copies = copies
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.calls = 0
        self.forget: frozenset[str] = frozenset()
        """Calls that this disk does not do: what a program would be that forgot them."""
        self.lock = threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CALLS:
            return found

        def call(*args: Any) -> Any:
            result = None if name in self.forget else found(*args)
            with self.lock:
                self.calls += 1
                self._fail_now("synced", self.root, self.copies / f"{self.calls}-synced")
                self._fail_now("names", self.root, self.copies / f"{self.calls}-names")
            return result

        return call

    def make_directory(self, path: Path) -> None:
        known = path.exists()
        super().make_directory(path)
        if not known:
            self.names[path.stat().st_ino] = {}

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.contents[os.fstat(fd).st_ino] = b""  # the number may have been a removed file's
        return fd

    def sync_file(self, fd: int) -> None:
        super().sync_file(fd)
        self.contents[os.fstat(fd).st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.names[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}

    def _fail_now(self, kind: str, source: Path, target: Path) -> None:
        """What is found after a power failure at this moment."""
        target.mkdir(parents=True)
        if not source.exists():
            return
        if kind == "synced":
            self._write(self.names.get(source.stat().st_ino, {}), target)
            return
        for entry in os.scandir(source):
            if entry.is_dir():
                self._fail_now(kind, Path(entry.path), target / entry.name)
            else:
                (target / entry.name).write_bytes(self.contents[entry.inode()])

    def _write(self, names: dict[str, int], target: Path) -> None:
        for name, inode in names.items():
            if inode in self.contents:
                (target / name).write_bytes(self.contents[inode])
            else:
                (target / name).mkdir()
                self._write(self.names.get(inode, {}), target / name)


def save_three(disk: Disk) -> list[int]:
    """Commits steps 1, 2 and 3, which removes step 1; how many calls had been made after each."""
    model, calls = torch.nn.Linear(2, 2), []
    with Checkpointer(disk.root, alone(), attempt=1, layer=disk) as checkpoints:
        checkpoints.track(model=model)
        for step in (1, 2, 3):
            torch.nn.init.constant_(model.weight, step)
            checkpoints.save(step, position(step), block=True, timeout=60)
            calls.append(disk.calls)
    return calls


def found_after(directory: Path) -> int:
    """The step that a job finds on what is left; 0 for none. Nothing committed may be found bad."""
    for manifest in committed(directory):
        verify(manifest)
    model = torch.nn.Linear(2, 2)
    with Checkpointer(directory, alone(), attempt=2) as checkpoints:
        checkpoints.track(model=model)
        restored = checkpoints.restore(timeout=60)
    if restored is None:
        assert not (directory / "quarantine").exists()
        return 0
    assert restored.notes == ()
    assert model.weight.tolist() == [[restored.step] * 2] * 2
    return restored.step


@pytest.mark.parametrize("kind", ["synced", "names"])
def test_power_fails_after_any_call(tmp_path: Path, kind: str) -> None:
    """Whenever it fails, the newest checkpoint there is whole; one whose save had returned is never lost."""
    disk = Disk(tmp_path / "ckpt", tmp_path / "after")
    returned = save_three(disk)
    assert disk.calls > 30
    steps = [found_after(disk.copies / f"{at}-{kind}") for at in range(1, disk.calls + 1)]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3}
    for step, calls in enumerate(returned, 1):
        assert steps[calls - 1] == step


@pytest.mark.parametrize(("forgotten", "kind"), [("sync_file", "names"), ("sync_directory", "synced")])
def test_a_forgotten_sync_is_seen(tmp_path: Path, forgotten: str, kind: str) -> None:
    """Proves that this test can fail: without the syncs, checkpoints that were said to be safe are lost or bad."""
    disk = Disk(tmp_path / "ckpt", tmp_path / "after")
    disk.forget = frozenset({forgotten})
    save_three(disk)
    last = disk.copies / f"{disk.calls}-{kind}"
    good = []
    for manifest in committed(last):
        try:
            verify(manifest)
            good.append(manifest)
        except CheckpointCorruptError:
            continue
    assert good == []
