"""A checkpoint is there whole or not at all; damage is found; the one before it is used."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.ranks import ThreadCoordinator, alone, run_ranks
from support.training import Training, position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.claim import Claim
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import Manifest, committed, directory_name, scan, verify
from wbdist.checkpoint.retention import collect_leftovers
from wbdist.core.tails import JournalPrefix
from wbdist.errors import CheckpointCorruptError, CheckpointError, FencedError


def save(directory: Path, *steps: int, attempt: int = 1, layer: FileLayer | None = None, keep_last: int = 2) -> None:
    """Saves a linear layer filled with the number of the step, once for each step."""
    model = torch.nn.Linear(2, 2)
    with Checkpointer(directory, alone(), attempt=attempt, layer=layer, keep_last=keep_last) as checkpoints:
        checkpoints.track(model=model)
        for step in steps:
            torch.nn.init.constant_(model.weight, step)
            checkpoints.save(step, position(step, attempt), block=True, timeout=20)


def restored_step(directory: Path, attempt: int = 2) -> tuple[int | None, tuple[str, ...]]:
    """What a new attempt starts from, checked against the weights it got."""
    model = torch.nn.Linear(2, 2)
    with Checkpointer(directory, alone(), attempt=attempt) as checkpoints:
        checkpoints.track(model=model)
        restored = checkpoints.restore(timeout=20)
        if restored is None:
            return None, ()
        assert model.weight.tolist() == [[restored.step] * 2] * 2
        assert restored.run == restored.own == position(restored.step, restored.attempt)
        return restored.step, restored.notes


def files_of(manifest: Manifest) -> list[Path]:
    return sorted(path for path in Path(manifest.directory).rglob("*") if path.is_file())


def test_manifest_tells_everything(tmp_path: Path) -> None:
    """The manifest holds step, attempt, run position, world size, names, and size and digest of every file."""
    save(tmp_path, 3, 5)
    newest, older = committed(tmp_path)
    assert (newest.step, newest.attempt, newest.world_size, newest.shared) == (5, 1, 1, ("model",))
    assert (older.step, newest.run, newest.torch) == (3, position(5), torch.__version__)
    assert {str(path.relative_to(newest.directory)) for path in files_of(newest)} == {*newest.files, "manifest.json"}
    verify(newest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3.a1", "step-5.a1"]


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    """A flipped bit, a cut, a byte more, an empty or a missing file: found in every file, and the one before is restored."""
    save(tmp_path / "good", 1, 2)
    count = len(files_of(committed(tmp_path / "good")[0]))
    assert count == 5
    for index in range(count):
        for damage in ("flip first", "flip middle", "flip last", "cut", "longer", "empty", "missing"):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            path = files_of(committed(tmp_path / "bad")[0])[index]
            content = bytearray(path.read_bytes())
            if damage.startswith("flip"):
                content[{"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[damage[5:]]] ^= 0x10
            path.write_bytes({"cut": content[:-1], "longer": content + b"\n", "empty": b""}.get(damage, content))
            if damage == "missing":
                path.unlink()
            step, notes = restored_step(tmp_path / "bad")
            assert step == 1, (path.name, damage)
            assert "quarantine" in notes[0]
            assert "continuing from step-1.a1" in notes[-1]
            assert [p.name for p in (tmp_path / "bad" / "quarantine").iterdir()] == ["step-2.a1"]


@pytest.mark.slow
def test_damage_anywhere_is_found_of_many_ranks(tmp_path: Path) -> None:
    """The same of a checkpoint by two ranks, with state of their own and the history that no server has."""
    journal = tmp_path / "journal"
    journal.write_bytes(os.urandom(5000))

    def rank(coordinator: ThreadCoordinator) -> None:
        model, prefix = torch.nn.Linear(2, 2), JournalPrefix("rank0.a1.wbj", str(journal), 4000)
        with Checkpointer(tmp_path / "good", coordinator, attempt=1) as checkpoints:
            checkpoints.track(model=model)
            checkpoints.track(per_rank=True, own=torch.nn.Linear(2, 2))
            for step in (1, 2):
                torch.nn.init.constant_(model.weight, step)
                torch.nn.init.constant_(model.bias, step)
                checkpoints.save(step, position(step), history=lambda: [prefix], block=True, timeout=20)

    def restored(coordinator: ThreadCoordinator) -> int:
        model = torch.nn.Linear(2, 2)
        with Checkpointer(tmp_path / "bad", coordinator, attempt=2) as checkpoints:
            checkpoints.track(model=model)
            checkpoints.track(per_rank=True, own=torch.nn.Linear(2, 2))
            found = checkpoints.restore(timeout=20)
            assert found is not None
            assert model.weight.unique().tolist() == [found.step]
            return found.step

    assert run_ranks(2, rank) == [None, None]
    names = [path.relative_to(tmp_path / "good" / "step-2.a1") for path in files_of(committed(tmp_path / "good")[0])]
    assert {"history-0", "history-1", "rank-0", "rank-1", "shared", "manifest.json"} == {name.parts[0] for name in names}
    for name in names:
        for damage in ("nothing", "flip", "cut", "missing"):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            path = tmp_path / "bad" / "step-2.a1" / name
            content = bytearray(path.read_bytes())
            if damage == "flip":
                content[len(content) // 3] ^= 1
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
            if damage == "missing":
                path.unlink()
            assert run_ranks(2, restored) == [2 if damage == "nothing" else 1] * 2, (name, damage)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Whichever bit of a manifest flips, it is not taken for one."""
    save(tmp_path, 1)
    path = tmp_path / "step-1.a1" / "manifest.json"
    whole = path.read_bytes()
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        good, broken = scan(tmp_path)
        assert (good, len(broken)) == ([], 1), offset
    path.write_bytes(whole)
    assert len(committed(tmp_path)) == 1


def test_nothing_valid_starts_from_nothing(tmp_path: Path) -> None:
    """When no checkpoint verifies, the job starts from nothing, and nothing bad stays in the way."""
    save(tmp_path, 1, 2)
    for manifest in committed(tmp_path):
        files_of(manifest)[-1].write_bytes(b"")
    assert restored_step(tmp_path) == (None, ())
    assert committed(tmp_path) == []
    assert len(list((tmp_path / "quarantine").iterdir())) == 2


def test_newest_attempt_wins(tmp_path: Path) -> None:
    """Two attempts that saved the same step, or an old one that went further: the newest attempt's checkpoint is used."""
    save(tmp_path, 4, 6, attempt=1)
    save(tmp_path, 4, attempt=2, keep_last=3)
    assert [m.name for m in committed(tmp_path)] == ["step-4.a2", "step-6.a1", "step-4.a1"]
    assert restored_step(tmp_path, attempt=3)[0] == 4


def test_a_fenced_attempt_commits_nothing(tmp_path: Path) -> None:
    """An attempt that a newer one has replaced can neither commit, nor remove, nor restore."""
    save(tmp_path, 4, attempt=2)
    with pytest.raises(FencedError, match="attempt 2 has taken over"):
        save(tmp_path, 5, attempt=1)
    with pytest.raises(FencedError, match="belongs to attempt 1"):
        restored_step(tmp_path, attempt=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4.a2"]


def test_checkpoints_brought_by_hand(tmp_path: Path) -> None:
    """Without the records of the attempts that made them, they are those of earlier attempts all the same."""
    save(tmp_path, 4, attempt=3)
    claim = Claim.take(tmp_path, run_id=None, project="", entity="", name=None)
    assert claim.attempt.number == 4
    assert restored_step(tmp_path, attempt=4)[0] == 4
    claim.release()


def test_leftovers_are_collected(tmp_path: Path) -> None:
    """Directories that an earlier attempt did not finish are removed at the start; other files are let be."""
    save(tmp_path, 4)
    for name in ("step-5.a1.tmp", "step-2.a1.removed.tmp"):
        shutil.copytree(tmp_path / "step-4.a1", tmp_path / name)
    (tmp_path / "notes.tmp").mkdir()
    assert restored_step(tmp_path)[0] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.tmp", "step-4.a1"]


class Fault(FileLayer):
    """Fails at the n-th system call of a save, as a full or dying disk does."""

    def __init__(self, at: int, code: int = errno.ENOSPC) -> None:
        self.at, self.code, self.calls = at, code, 0

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.code, os.strerror(self.code))

    def make_directory(self, path: Path) -> None:
        self._call()
        super().make_directory(path)

    def create(self, path: Path) -> int:
        self._call()
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._call()
        return super().write(fd, data)

    def sync_file(self, fd: int) -> None:
        self._call()
        super().sync_file(fd)

    def sync_directory(self, path: Path) -> None:
        self._call()
        super().sync_directory(path)

    def rename(self, old: Path, new: Path) -> None:
        self._call()
        super().rename(old, new)


def test_a_fault_at_every_system_call(tmp_path: Path) -> None:
    """Whichever call of a save fails: the save says so, the checkpoint before stays, and the next save works."""
    probe = Fault(0)
    save(tmp_path / "probe", 2, layer=probe)
    assert probe.calls > 20
    for at in range(1, probe.calls, 2 if probe.calls > 150 else 1):
        directory = tmp_path / str(at)
        save(directory, 1)
        model = torch.nn.Linear(2, 2)
        with Checkpointer(directory, alone(), attempt=1, layer=Fault(at)) as checkpoints:
            checkpoints.track(model=model)
            torch.nn.init.constant_(model.weight, 2)
            with pytest.raises(CheckpointError, match=r"step 2 was not committed: rank 0 .*No space left"):
                checkpoints.save(2, position(2), block=True, timeout=20)
            assert [m.step for m in committed(directory)] == [1], at
            torch.nn.init.constant_(model.weight, 3)
            checkpoints.save(3, position(3), block=True, timeout=20)
        assert restored_step(directory) == (3, ()), at


def test_a_fault_at_every_system_call_of_either_rank(tmp_path: Path) -> None:
    """Whichever rank's call fails: all ranks say so with its reason, the checkpoint before stays, and the next save works."""

    def act(directory: Path, failing: int, at: int) -> int:
        def rank(coordinator: ThreadCoordinator) -> int:
            model = torch.nn.Linear(2, 2)
            torch.nn.init.zeros_(model.weight)
            torch.nn.init.zeros_(model.bias)
            with Checkpointer(directory, coordinator, attempt=1) as checkpoints:
                checkpoints.track(model=model)
                checkpoints.track(per_rank=True, own=torch.nn.Linear(2, 2))
                checkpoints.save(1, position(1), block=True, timeout=20)
                layer = checkpoints._layer = Fault(at if coordinator.rank == failing else 0)
                if at:
                    with pytest.raises(CheckpointError, match=rf"step 2 was not committed: rank {failing} .*No space left"):
                        checkpoints.save(2, position(2), block=True, timeout=20)
                    assert [m.step for m in committed(directory)] == [1], at
                    coordinator.barrier("looked", 20)
                    checkpoints._layer = FileLayer()
                checkpoints.save(3, position(3), block=True, timeout=20)
                return layer.calls

        first, second = run_ranks(2, rank)
        assert isinstance(first, int), first
        assert isinstance(second, int), second
        assert [m.step for m in committed(directory)] == [3, 1]
        verify(committed(directory)[0])
        assert not list(directory.glob("*.tmp"))
        return (first, second)[failing]

    for failing in (0, 1):
        calls = act(tmp_path / f"probe-{failing}", failing, 0)
        assert calls > 8
        # Of rank 0 those of the commit, but the last one, after which the checkpoint stands; the others are one rank's, above.
        for at in range(calls - 5, calls) if failing == 0 else range(1, calls + 1):
            act(tmp_path / f"{failing}-{at}", failing, at)


class Overtaken(Fault):
    """A newer attempt begins, and removes what this one has not finished, before the n-th system call of a save."""

    def __init__(self, at: int, directory: Path) -> None:
        super().__init__(at)
        self.directory = directory

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            claims = self.directory / "attempts"
            claims.mkdir(parents=True)
            (claims / "000002.json").write_text("{}")
            collect_leftovers(FileLayer(), self.directory, 2)


def test_overtaken_at_every_system_call(tmp_path: Path) -> None:
    """Proves that a save during which a newer attempt begins says that, whatever it misses then, and commits nothing: or had
    committed already."""
    probe = Fault(0)
    save(tmp_path / "probe", 2, layer=probe)
    for at in range(1, probe.calls + 1):
        directory = tmp_path / str(at)
        layer = Overtaken(at, directory)
        if at == probe.calls:  # the directory's sync, behind the rename
            save(directory, 2, layer=layer)
            assert [m.step for m in committed(directory)] == [2]
        else:
            with pytest.raises(FencedError, match=r"step 2 was not committed: rank 0 .*attempt 2 has taken over"):
                save(directory, 2, layer=layer)
            assert committed(directory) == [], at


def test_a_disk_full_within_a_big_tensor_is_called_that(tmp_path: Path) -> None:
    """Also where the data goes past the page cache."""
    probe = Fault(0)
    model = torch.nn.Linear(2400, 2400)  # more than one write
    with Checkpointer(tmp_path / "probe", alone(), attempt=1, layer=probe) as checkpoints:
        checkpoints.track(model=model)
        checkpoints.save(1, position(1), timeout=20)
    assert probe.calls > 15
    for at in range(5, probe.calls - 3):
        checkpoints = Checkpointer(tmp_path / "full", alone(), attempt=1, layer=Fault(at))
        checkpoints.track(model=model)
        with pytest.raises(CheckpointError, match=r"OSError: \[Errno 28\] No space left"):
            checkpoints.save(1, position(1), block=True, timeout=20)
    assert committed(tmp_path / "full") == []


def test_a_failed_background_save_is_raised_by_the_next_call(tmp_path: Path) -> None:
    """Nothing is swallowed: what fails in the background is raised by the next save, once, and training can go on."""
    training = Training(alone(), tmp_path, layer=Fault(8))
    training.track()
    training.checkpoints.save(1, position(1), timeout=20)
    with pytest.raises(CheckpointError, match="step 1 was not committed"):
        training.checkpoints.save(2, position(2), timeout=20)
    training.checkpoints.save(3, position(3), timeout=20)
    training.checkpoints.close()
    assert [m.step for m in committed(tmp_path)] == [3]


def test_bytes_on_disk_are_the_ones_announced(tmp_path: Path) -> None:
    """What a PendingSave tells is what happened."""
    training = Training(alone(), tmp_path)
    training.track()
    pending = training.checkpoints.save(1, position(1), timeout=20, reason="interval")
    pending.wait(20)
    (manifest,) = committed(tmp_path)
    assert pending.done()
    assert pending.error is None
    assert pending.bytes == manifest.bytes
    assert manifest.reason == "interval"
    assert manifest.name == pending.name == directory_name(1, 1)
    assert 0 < pending.stall_s < 5
    assert 0 < pending.write_s < 20
    assert pending.durable_at is not None
    assert training.checkpoints.save(1, position(1), timeout=20) is pending
    training.checkpoints.close()


def test_a_manifest_of_another_version_is_not_touched(tmp_path: Path) -> None:
    """A checkpoint of a newer wbdist is refused, not quarantined: it is somebody's work."""
    import msgspec

    from wbdist.checkpoint.manifest import VERSION, seal

    save(tmp_path, 1)
    path = tmp_path / "step-1.a1" / "manifest.json"
    path.write_bytes(seal(msgspec.structs.replace(committed(tmp_path)[0], version=VERSION + 1)))
    with pytest.raises(CheckpointError, match=f"has format version {VERSION + 1}") as caught:
        restored_step(tmp_path)
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert path.exists()
