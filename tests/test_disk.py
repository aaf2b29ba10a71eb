"""What is on the disk when a call returns, told by the system calls that were made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wbdist import disk
from wbdist.checkpoint.claim import Attempt, JobIdentity, adopt
from wbdist.checkpoint.files import FileLayer
from wbdist.run.journal import JournalHeader, JournalWriter
from wbdist.server.files import FileStore


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was synced, in order."""
    found: list[Path] = []
    sync = os.fsync

    def told(fd: int) -> None:
        sync(fd)
        found.append(Path(f"/proc/self/fd/{fd}").readlink())

    monkeypatch.setattr(os, "fsync", told)
    return found


def test_the_name_is_synced_after_what_it_names(tmp_path: Path, synced: list[Path]) -> None:
    """Proves for a journal, an attempt's record, a checkpoint's directory and the server's files that their directory is
    synced, not only the file."""
    header = JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n", writer="w")
    (tmp_path / "run").mkdir()
    with JournalWriter.create(tmp_path / "run" / "w.a1.wbdj", header) as journal:
        journal.sync()
        assert synced == [tmp_path / "run" / "w.a1.wbdj", tmp_path / "run"]
    job = JobIdentity("r", "p", "", None, 0.0)
    synced.clear()
    adopt(tmp_path / "ckpt", job, [Attempt(1, "n", 0.0, "h", 1, "start")])
    assert [path.is_dir() for path in synced] == [False, True] * 2
    assert synced[1::2] == [tmp_path / "ckpt", tmp_path / "ckpt" / "attempts"]
    synced.clear()
    FileLayer().sync_directory(tmp_path / "ckpt")
    assert synced == [tmp_path / "ckpt"]
    synced.clear()
    store = FileStore(tmp_path / "files")
    with store.writer() as writer:
        writer.write(b"content")
        kept = store.path(writer.keep().sha256)
    assert synced[1:] == [kept.parent]
    assert synced[0].parent == tmp_path / "files" / "tmp"


def test_a_private_file_is_whole_or_the_old_one(tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that only the owner may read it whatever the umask and the old file's mode, that it is synced before it has its
    name when that is asked for, and that a failure leaves the old content and nothing else."""
    path = tmp_path / "key"
    path.write_bytes(b"old")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        disk.replace_private(path, b"new", synced=True)
    finally:
        os.umask(before)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    assert [file.parent for file in synced] == [tmp_path]
    assert synced != [path]
    disk.replace_private(path, b"newer", synced=False)
    assert (path.read_bytes(), len(synced)) == (b"newer", 1)

    def broken(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        disk.replace_private(path, b"lost", synced=True)
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]
