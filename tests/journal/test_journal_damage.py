"""A journal survives what can happen to it: kills, torn tails, flipped bits, full disks."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wbdist.errors import DiskFullError
from wbdist.run.journal import JournalHeader, JournalReader, JournalWriter, Kind, Record

MakeWriter = Callable[..., JournalWriter]
HEADER = JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n", writer="w")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Record], list[int]]:
    """A sound journal's bytes, its records, and the offset at which each record ends."""
    path = tmp_path_factory.mktemp("sound") / "w.a1.wbdj"
    ends = []
    with JournalWriter.create(path, HEADER) as writer:
        for step in range(12):
            if step % 4 == 3:
                writer.append(Kind.CONSOLE, {"text": "line", "stream": "stdout"})
            else:
                writer.append_row(
                    {"x": step / 3, "i": step} if step % 2 else {"x": {"y": step}}, step=step, commit=True, time=1.0
                )
            ends.append(writer.size)
    ends.append(path.stat().st_size)
    with JournalReader.open(path) as reader:
        records = reader.read()
    return path.read_bytes(), records, ends


def check_prefix(path: Path, data: bytes, damage: int, sound: tuple[bytes, list[Record], list[int]]) -> None:
    """The damaged journal gives exactly the records that end at or before the damage."""
    _, records, ends = sound
    path.write_bytes(data)
    with JournalReader.open(path) as reader:
        assert reader.read() == records[: sum(end <= damage for end in ends)]
        assert reader.read() == []
        assert (reader.ended is not None) == (damage >= ends[-1])


def test_torn_at_every_byte(tmp_path: Path, sound: tuple[bytes, list[Record], list[int]]) -> None:
    """Proves that a journal cut at any byte, with or without reserved zeros behind, reads as the records before the cut."""
    data, _, _ = sound
    with JournalReader_of(tmp_path, data) as reader:
        first = reader.first
    for cut in range(first, len(data) + 1):
        check_prefix(tmp_path / "cut.wbdj", data[:cut], cut, sound)
        # A cut inside trailing zero bytes of a frame, followed by zeros, is the whole frame again: nothing was lost.
        whole = cut + len(data[cut:]) - len(data[cut:].lstrip(b"\0"))
        check_prefix(tmp_path / "zeros.wbdj", data[:cut] + bytes(4096), whole, sound)


def JournalReader_of(directory: Path, data: bytes) -> JournalReader:  # noqa: N802
    path = directory / "sound.wbdj"
    path.write_bytes(data)
    return JournalReader.open(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), tail=st.binary(max_size=40))
def test_a_changed_byte_ends_the_journal_before_its_frame(
    tmp_path: Path, sound: tuple[bytes, list[Record], list[int]], place: float, flip: int, tail: bytes
) -> None:
    """Proves that any changed byte, and any garbage behind the end, is never taken for a record."""
    data, records, _ = sound
    with JournalReader_of(tmp_path, data) as reader:
        first = reader.first
    at = first + int(place * (len(data) - first))
    changed = bytearray(data)
    changed[at] ^= flip
    check_prefix(tmp_path / "flip.wbdj", bytes(changed), at, sound)
    (tmp_path / "tail.wbdj").write_bytes(data + tail)
    with JournalReader.open(tmp_path / "tail.wbdj") as reader:
        assert reader.read() == records
        assert reader.torn() == any(tail)


def test_a_frame_out_of_sequence_is_not_believed(tmp_path: Path, sound: tuple[bytes, list[Record], list[int]]) -> None:
    """Proves that a sound frame in the wrong place (a reused block, a doubled write) ends the journal."""
    data, records, ends = sound
    doubled = data[: ends[4]] + data[ends[3] : ends[4]] + data[ends[4] :]
    (tmp_path / "d.wbdj").write_bytes(doubled)
    with JournalReader.open(tmp_path / "d.wbdj") as reader:
        assert reader.read() == records[:5]


KILLED = """
import mmap, sys
from pathlib import Path
from wbdist.run.journal import JournalHeader, JournalWriter
with open(sys.argv[2], "r+b") as file:
    cell = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")
header = JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n", writer="w")
writer = JournalWriter.create(Path(sys.argv[1]), header, storage=sys.argv[3])
step = 0
while True:
    writer.append_row({"i": step, "x": step / 7, "y": 1.0, "z": 2.0}, step=step, commit=True, time=1.0)
    step += 1
    cell[0] = step
"""


@pytest.mark.parametrize("rows", [1, 3000, 20000])
def test_sigkill_at_full_rate_loses_nothing(tmp_path: Path, storage: str, rows: int) -> None:
    """Proves that after SIGKILL at full rate every row whose append had returned is there, and no torn one."""
    path = tmp_path / "w.a1.wbdj"
    (tmp_path / "counter").write_bytes(bytes(8))
    with (
        (tmp_path / "counter").open("r+b") as file,
        mmap.mmap(file.fileno(), 8) as shared,
        memoryview(shared).cast("q") as cell,
    ):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), file.name, storage])
        while cell[0] < rows:
            assert process.poll() is None, "the writer failed, see its traceback above"
        process.kill()
        process.wait(10)
        returned = cell[0]
    with JournalReader.open(path) as reader:
        assert not reader.writer_alive()
        seen: list[int] = []
        while batch := reader.read():
            seen += [record.data["i"] for record in batch]
        assert not reader.torn() or len(seen) == returned
    assert seen == list(range(len(seen)))
    assert returned <= len(seen) <= returned + 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(writer: JournalWriter, start: int = 0, columns: int = 20) -> int:
    """Logs until the disk is full; the number of the row that was refused."""
    row = {f"m{k}": 0.5 for k in range(columns)}
    step = start
    with pytest.raises(DiskFullError, match=r"rank0\.a1\.wbdj.*safe"):
        for step in range(start, 100_000):
            writer.append_row({"i": step, **row}, step=step, commit=True, time=1.0)
    return step


def test_full_disk(small_disk: Path, make_writer: MakeWriter, storage: str) -> None:
    """Proves on a really full disk: a clear error on that call, all earlier rows safe, no torn row read, and logging works
    again, without a gap in the sequence, once there is space."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    writer = make_writer(directory=small_disk, storage=storage)
    refused = fill(writer)
    assert refused > 100
    assert fill(writer, refused) == refused, "a full disk took a row"
    with JournalReader.open(writer.path) as reader:
        seen: list[int] = []
        while batch := reader.read():
            seen += [record.data["i"] for record in batch]
        assert seen == list(range(refused))
        assert storage == "written" or not reader.torn()
        ballast.unlink()
        assert fill(writer, refused) > refused + 100
        while batch := reader.read():
            seen += [record.data["i"] for record in batch]
        assert seen == list(range(len(seen)))
        assert len(seen) > refused + 100


def test_full_disk_at_close(small_disk: Path, make_writer: MakeWriter, storage: str) -> None:
    """Proves that an END that finds no space says so, and still leaves every row readable and the lock released."""
    writer = make_writer(directory=small_disk, storage=storage)
    refused = fill(writer, columns=0)  # the smallest rows there are: what they leave is too small for END
    with pytest.raises(DiskFullError):
        writer.close(0)
    with JournalReader.open(writer.path) as reader:
        assert len([r for batch in iter(reader.read, []) for r in batch]) == refused
        assert reader.ended is None
        assert not reader.writer_alive()


def test_file_size_limit(make_writer: MakeWriter, storage: str) -> None:
    """Proves that a file size limit (EFBIG, as batch systems set) is told like a full disk, not by a signal or a torn row."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = make_writer(storage=storage)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        refused = fill(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert fill_some(writer, refused) == refused + 10
    with JournalReader.open(writer.path) as reader:
        assert [r.data["i"] for batch in iter(reader.read, []) for r in batch] == list(range(refused + 10))


def fill_some(writer: JournalWriter, start: int) -> int:
    for step in range(start, start + 10):
        writer.append_row({"i": step}, step=step, commit=True, time=1.0)
    return start + 10
