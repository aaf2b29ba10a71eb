"""Data files: every element once, whoever writes which part; any part can be read; others can read them, too."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from support.ranks import ThreadCoordinator, alone, run_ranks
from support.training import position
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from wbdist.checkpoint import mapped, storage
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.image import PAGE, Box, lay_out
from wbdist.checkpoint.manifest import committed, digest, verify
from wbdist.checkpoint.shares import share_out
from wbdist.checkpoint.staging import Arena, Staged
from wbdist.checkpoint.storage import TensorFiles, read_tensors
from wbdist.checkpoint.tree import Spec
from wbdist.errors import CheckpointCorruptError, CheckpointError


def written(directory: Path, tensors: dict[str, torch.Tensor], world_size: int, alike: frozenset[str]) -> dict[str, Spec]:
    """What `world_size` ranks write of `tensors`, one after the other."""
    directory.mkdir()
    for rank in range(world_size):
        boxes = share_out(tensors, alike, rank, world_size)
        if boxes:
            layout = lay_out(boxes)
            staged = Arena().stage([layout])
            staged.copy()
            entry = FileLayer().store(directory / f"{rank}.safetensors", memoryview(staged.files[0].numpy()))
            assert (entry.size, entry.xxh3) == (layout.size, digest(directory / f"{rank}.safetensors"))
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_any_number_of_writers(tmp_path: Path, world_size: int) -> None:
    """Tensors of all shapes and types, some shared out and some not, come back bit by bit."""
    torch.manual_seed(3)
    tensors = {
        "matrix": torch.randn(17, 5),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "one row": torch.randn(1, 100),
        "half": torch.randn(33).to(torch.bfloat16),
        "bools": torch.rand(9) > 0.5,
        "complex": torch.randn(4, 3, dtype=torch.complex128),
        "across": torch.randn(6, 8).t(),
        "words": torch.arange(11),
        "cube": torch.randn(4, 3, 2),
        "single": torch.randn(8, 2),
    }
    wanted = written(tmp_path / "d", tensors, world_size, frozenset(tensors) - {"single"})
    found = read_tensors(tmp_path / "d", wanted)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    part = TensorFiles(tmp_path / "d").read("matrix", wanted["matrix"], ((3, 1), (11, 3)))
    assert torch.equal(part, tensors["matrix"][3:14, 1:4])


def test_shares_are_equal() -> None:
    """Each rank has its part of the bytes, whatever the tensors' sizes; no element is written twice or forgotten."""
    tensors = {str(n): torch.empty(1 + 37 * n % 101, 64) for n in range(40)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shares = [share_out(tensors, frozenset(tensors), rank, 4) for rank in range(4)]
    sizes = [sum(box.tensor.nbytes for box in boxes) for boxes in shares]
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 2 * 64 * 4


def test_a_missing_file_is_no_silent_zero(tmp_path: Path) -> None:
    """What another rank should have written is not made up."""
    tensors = {"a": torch.randn(10, 10)}
    wanted = written(tmp_path / "d", tensors, 2, frozenset(tensors))
    (tmp_path / "d" / "1.safetensors").unlink()
    with pytest.raises(CheckpointCorruptError, match="holds 50 of the 100 elements of 'a'"):
        read_tensors(tmp_path / "d", wanted)
    (tmp_path / "d" / "1.safetensors").touch()
    with pytest.raises(CheckpointCorruptError, match=r"1\.safetensors is not a data file"):
        read_tensors(tmp_path / "d", wanted)


def test_big_data_goes_past_the_page_cache(tmp_path: Path) -> None:
    """A file of some MiB and some odd bytes is on disk whole; its tensors lie on pages, aligned for their types."""
    layout = lay_out([Box("a", torch.randn(1_500_001), (0,)), Box("b", torch.arange(7, dtype=torch.uint8), (0,))])
    staged = Arena().stage([layout])
    staged.copy()
    assert staged.files[0].data_ptr() % PAGE == 0
    assert [place.start % place.box.tensor.itemsize for place in layout.places] == [0, 0]
    entry = FileLayer().store(tmp_path / "f", memoryview(staged.files[0].numpy()))
    assert (tmp_path / "f").stat().st_size == entry.size == layout.size
    assert digest(tmp_path / "f") == entry.xxh3


def test_a_disk_that_takes_odd_amounts(tmp_path: Path) -> None:
    """Short writes of any length lose nothing."""

    class Slow(FileLayer):
        def write(self, fd: int, data: memoryview) -> int:
            return super().write(fd, data[: 1_000_003 if len(data) > 1_000_003 else 3 + len(data) // 2])

    data = torch.randint(0, 255, (3_000_000,), dtype=torch.uint8)
    entry = Slow().store(tmp_path / "f", memoryview(data.numpy()))
    assert (tmp_path / "f").read_bytes() == data.numpy().tobytes()
    assert digest(tmp_path / "f") == entry.xxh3


def test_torch_reads_it_too(tmp_path: Path) -> None:
    """torch.distributed.checkpoint's own safetensors reader loads what two ranks of ours wrote."""
    model = torch.nn.Linear(30, 20)

    def act(coordinator: ThreadCoordinator) -> None:
        with Checkpointer(tmp_path, coordinator, attempt=1) as checkpoints:
            checkpoints.track(model=model)
            checkpoints.save(1, position(1), timeout=20)

    assert run_ranks(2, act) == [None, None]
    (manifest,) = committed(tmp_path)
    verify(manifest)
    assert {"shared/00000.safetensors", "shared/00001.safetensors"} <= manifest.files.keys()
    target = {"model.weight": torch.zeros(20, 30), "model.bias": torch.zeros(20)}
    load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path / "step-1.a1" / "shared")), no_dist=True)
    assert torch.equal(target["model.weight"], model.weight)
    assert torch.equal(target["model.bias"], model.bias)


def test_ranks_that_drifted_apart_are_told(tmp_path: Path) -> None:
    """A model that is not kept alike is refused by name: a share from each rank would be nobody's model."""

    def act(coordinator: ThreadCoordinator) -> None:
        model = torch.nn.Linear(8, 8)
        torch.nn.init.constant_(model.weight, 1.0)
        torch.nn.init.constant_(model.bias, float(coordinator.rank))
        checkpoints = Checkpointer(tmp_path, coordinator, attempt=1)
        checkpoints.track(model=model)
        with pytest.raises(CheckpointError, match=r"ranks 0 and 1 hold different values of model\.bias"):
            checkpoints.save(1, position(1), block=True, timeout=20)

    assert run_ranks(2, act) == [None, None]
    assert committed(tmp_path) == []


def test_buffers_are_rank_zeros(tmp_path: Path) -> None:
    """Running statistics differ between the ranks of a DDP job; those of rank 0, which DDP goes on with, are saved."""

    def act(coordinator: ThreadCoordinator) -> None:
        model = torch.nn.BatchNorm1d(1000)
        assert model.running_mean is not None
        model.running_mean.fill_(coordinator.rank + 1.0)
        with Checkpointer(tmp_path, coordinator, attempt=1) as checkpoints:
            checkpoints.track(model=model)
            checkpoints.save(1, position(1), timeout=20)

    assert run_ranks(3, act) == [None] * 3
    restored = torch.nn.BatchNorm1d(1000)
    checkpoints = Checkpointer(tmp_path, alone(), attempt=2)
    checkpoints.track(model=restored)
    checkpoints.restore(timeout=20)
    assert restored.running_mean is not None
    assert restored.running_mean.unique().tolist() == [1.0]


def test_an_optimizer_is_read_into_the_memory_that_it_has(tmp_path: Path) -> None:
    """State that is there already is overwritten where it lies, bit by bit; nothing is allocated for it."""
    model, optimizer = stepped(1)
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.track(model=model, optimizer=optimizer)
        checkpoints.save(1, block=True, timeout=60)
    wanted = {key: slot[key].clone() for slot in optimizer.state.values() for key in ("step", "exp_avg", "exp_avg_sq")}
    model, optimizer = stepped(3)
    places = {key: slot[key].data_ptr() for slot in optimizer.state.values() for key in wanted}
    with Checkpointer(tmp_path, alone(), attempt=2) as checkpoints:
        checkpoints.track(model=model, optimizer=optimizer)
        assert checkpoints.restore(timeout=60) is not None
    for slot in optimizer.state.values():
        assert {key: slot[key].data_ptr() for key in wanted} == places
        assert all(torch.equal(slot[key], value) for key, value in wanted.items())


def stepped(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        model.weight.grad = torch.full((2, 3), float(step + 1))
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("size", [0, 1, PAGE, 3 * PAGE, 3 * PAGE + 1])
def test_files_are_hashed_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """What is read piece by piece has the digest of the whole, whatever the size."""
    monkeypatch.setattr(mapped, "_WINDOW", PAGE)
    content = os.urandom(size)
    (tmp_path / "f").write_bytes(content)
    assert digest(tmp_path / "f") == xxhash.xxh3_128_hexdigest(content)


def test_bytes_are_written_once_they_are_copied(tmp_path: Path) -> None:
    """The disk begins before the copy is through, and never gets a byte of the save before."""
    tensor, arena = torch.zeros(10 << 20), Arena()
    layout = lay_out([Box("a", tensor, (0,))])
    arena.stage([layout]).copy()
    tensor.fill_(1)
    staged = arena.stage([layout])
    asked = threading.Event()
    allowed, written, early = 0, 0, []

    class Watching(FileLayer):
        def write(self, fd: int, data: memoryview) -> int:
            nonlocal written
            early.append(written + len(data) > allowed)
            written += (count := super().write(fd, data))
            return count

    def ready(_: Path, size: int) -> None:
        nonlocal allowed
        mine = threading.current_thread() is writer  # else the digest's
        if mine:
            asked.set()
        staged.ready(0, size)
        if mine:
            allowed = size

    entries = []
    data = memoryview(staged.files[0].numpy())
    writer = threading.Thread(target=lambda: entries.append(Watching().store_all({tmp_path / "f": data}, ready)), daemon=True)
    writer.start()
    assert asked.wait(60)
    assert early == []
    staged.copy()
    writer.join(60)
    assert early == [False] * 3
    (entry,) = entries[0].values()
    assert entry.xxh3 == digest(tmp_path / "f") == xxhash.xxh3_128_hexdigest(data)
    assert bytes(data[-4:]) == torch.ones(1).numpy().tobytes()


def test_a_copy_that_fails_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call says why, nothing is committed of it, and the next save works."""
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.track(model=torch.nn.Linear(2, 2))
        with monkeypatch.context() as patch:
            patch.setattr(Staged, "_copy", lambda _: (_ for _ in ()).throw(RuntimeError("the device is gone")))
            with pytest.raises(RuntimeError, match="the device is gone"):
                checkpoints.save(1, timeout=60)
        checkpoints.save(2, block=True, timeout=60)
    assert [manifest.step for manifest in committed(tmp_path)] == [2]


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the files of many ranks, one that wants its shard does not read the others'."""
    tensors = {name: torch.randn(64, PAGE // 4) for name in ("a", "b")}
    wanted = written(tmp_path / "d", tensors, 2, frozenset(tensors))
    read = []
    monkeypatch.setattr(storage, "populate", lambda region, start, end: read.append(end - start))
    files = TensorFiles(tmp_path / "d")
    assert sum(read) < 5 * PAGE
    read.clear()
    assert torch.equal(files.read("b", wanted["b"]), tensors["b"])
    assert read == [64 * PAGE]
