"""What goes into a journal comes out of it, exactly, and a writer's life can be seen from outside."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.journals import read_all, records_of

from wbdist.core.position import Watermark
from wbdist.errors import JournalCorruptError, ShutdownError, UsageError
from wbdist.run.journal import (
    FrameDecoder,
    JournalHeader,
    JournalReader,
    JournalWriter,
    Kind,
    Record,
    find_journals,
    journal_name,
    lock_path,
    writer_alive,
)
from wbdist.run.values import flat_row

MakeWriter = Callable[..., JournalWriter]


def seen_alive(path: Path) -> bool:
    """Whether another process sees the journal's writer alive."""
    probe = "import sys; from wbdist.run.journal import Path, writer_alive; print(writer_alive(Path(sys.argv[1])))"
    command = [sys.executable, "-c", probe, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip() == "True"


def same(left: Any, right: Any) -> bool:
    """Equal in value and type, NaN equal to NaN."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.one_of(
    st.floats(),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.none(),
    TEXT,
    st.sampled_from([math.nan, math.inf, -0.0, 5e-324]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
CALLS = st.tuples(
    st.dictionaries(TEXT, VALUES, max_size=5),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.booleans(),
    st.floats(0, 2e9),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(CALLS, max_size=20))
def test_rows_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, storage: str, calls: list[Any]) -> None:
    """Proves that any row, packed or not, is read back with its values, their types, its step, commit and time unchanged,
    nested dicts flattened."""
    path = tmp_path_factory.mktemp("j") / "w.a1.wbdj"
    header = JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n", writer="w")
    with JournalWriter.create(path, header, storage=storage) as writer:
        for data, step, commit, time in calls:
            writer.append_row(data, step=step, commit=commit, time=time)
    records = [record for record in read_all(path) if record.kind is Kind.ROW]
    assert [(r.step, r.commit, r.time) for r in records] == [(step, commit, time) for _, step, commit, time in calls]
    assert all(same(record.data, flat_row(data)) for record, (data, *_) in zip(records, calls, strict=True))


def test_scalars_cost_at_most_110_bytes_a_row(make_writer: MakeWriter) -> None:
    """Proves the space goal: ten floats, their step, time and framing in at most 110 bytes a row, schema and header apart."""
    writer = make_writer()
    row = {f"train/metric_{i}": i / 7 for i in range(10)}
    writer.append_row(row, step=0, commit=True, time=1.0)
    before = writer.size
    for step in range(1, 101):
        writer.append_row(row, step=step, commit=True, time=1.0)
    assert (writer.size - before) / 100 <= 110


def test_other_libraries_scalars_become_plain_ones(make_writer: MakeWriter) -> None:
    """Proves that numpy and torch scalars, arrays, enums, bytes, sets and huge ints are reduced to values every reader has."""

    class Phase(StrEnum):
        TRAIN = "train"

    writer = make_writer()
    writer.append_row(
        {
            "f32": np.float32(0.5),
            "f64": np.float64(0.1),
            "i64": np.int64(7),
            "flag": np.bool_(True),
            "tensor": torch.tensor(2.5, requires_grad=True),
            "count": torch.tensor([3]),
            "array": np.arange(3),
            "phase": Phase.TRAIN,
            "bytes": b"abc",
            "set": {1},
            "huge": 2**70,
            "u64": 2**64 - 1,
        },
        step=0,
        commit=True,
        time=1.0,
    )
    expected = {
        "f32": 0.5, "f64": 0.1, "i64": 7, "flag": True, "tensor": 2.5, "count": 3, "array": [0, 1, 2],
        "phase": "train", "bytes": "abc", "set": [1], "huge": float(2**70), "u64": 2**64 - 1,
    }  # fmt: skip
    assert same(records_of(writer.path, Kind.ROW)[0], expected)


@pytest.mark.parametrize("bad", [{"x": object()}, {3: 1.0}, {"x": {"y": threading.Lock()}}])
def test_a_row_that_cannot_be_journalled_changes_nothing(make_writer: MakeWriter, bad: dict[Any, Any]) -> None:
    """Proves that a refused row raises TypeError and leaves the journal as it was, also between packed rows."""
    writer = make_writer()
    writer.append_row({"x": 1.0}, step=0, commit=True, time=1.0)
    with pytest.raises(TypeError):
        writer.append_row(bad, step=1, commit=True, time=1.0)
    writer.append_row({"x": 2.0}, step=1, commit=True, time=1.0)
    assert records_of(writer.path, Kind.ROW) == [{"x": 1.0}, {"x": 2.0}]
    assert writer.seq == 2


def test_ever_new_shapes_stay_bounded_and_readable(make_writer: MakeWriter) -> None:
    """Proves that more shapes than are packed (a script with a new key each step) are still all journalled exactly."""
    writer = make_writer()
    for step in range(1500):
        writer.append_row({f"k{step}": step}, step=step, commit=True, time=1.0)
    assert records_of(writer.path, Kind.ROW) == [{f"k{step}": step} for step in range(1500)]
    assert len(writer._shapes) == 1024


def test_rows_longer_than_a_window(make_writer: MakeWriter, storage: str) -> None:
    """Proves that rows larger than the mapped window, and than one read, go in and out whole, between small ones."""
    writer = make_writer(storage=storage)
    rows = [{"text": letter * size} for letter, size in [("a", 3), ("b", 700_000), ("c", 5), ("d", 3_000_000), ("e", 1)]]
    for step, row in enumerate(rows):
        writer.append_row(row, step=step, commit=True, time=1.0)
    assert records_of(writer.path, Kind.ROW) == rows


def test_other_records_and_the_end(make_writer: MakeWriter) -> None:
    """Proves that records of every kind keep order, seq, time and payload, and that `ended` tells the writer's last word."""
    writer = make_writer()
    assert writer.append(Kind.RUN, {"group": "g", "tags": ["a"]}, 5.0) == 0
    assert writer.append(Kind.CONFIG, {"set": {"lr": 0.1}}) == 1
    writer.append(Kind.PREEMPTING, {})
    assert writer.sync() == 2
    writer.close(3, "exit")
    writer.close(0)
    with JournalReader.open(writer.path) as reader:
        records = reader.read()
        assert [(r.seq, r.kind) for r in records] == [(0, Kind.RUN), (1, Kind.CONFIG), (2, Kind.PREEMPTING), (3, Kind.END)]
        assert (records[0].time, records[0].data) == (5.0, {"group": "g", "tags": ["a"]})
        assert reader.ended == {"exit_code": 3, "cause": "exit"}
        assert not reader.torn()
    assert writer.path.stat().st_size == writer.size, "reserved space was not given back"
    with pytest.raises(ShutdownError, match="closed"):
        writer.append_row({"x": 1.0}, step=0, commit=True, time=1.0)
    with pytest.raises(ShutdownError):
        writer.sync()


def test_header_facts_come_back(tmp_path: Path) -> None:
    """Proves that every fact of the header is read back, the base watermark included, and decides the starting step."""
    base = Watermark(attempt=2, counts={"wandb-history.jsonl": {"rank0": 7}}, step=6)
    header = JournalHeader(
        run_id="r", project="p", entity="e", attempt=3, nonce="abc", writer="rank0", role="feed", base=base, cause="lost",
        rank=1, host="h", pid=4, created=5.5, online=True, base_url="http://x", runtime=9.0, summary={"loss": 0.5},
    )  # fmt: skip
    with (
        JournalWriter.create(tmp_path / journal_name("rank0", 3), header),
        JournalReader.open(tmp_path / "rank0.a3.wbdj") as reader,
    ):
        assert reader.header == header
        assert reader.header.starting_step == 7


def test_a_reader_follows_a_living_writer(make_writer: MakeWriter, storage: str) -> None:
    """Proves that a reader sees each record as soon as the append returned, and nothing twice, over many windows."""
    writer = make_writer(storage=storage)
    with JournalReader.open(writer.path) as reader:
        assert reader.read() == []
        seen: list[int] = []
        for step in range(6000):
            writer.append_row(
                {"x": float(step), "i": step, **{f"m{k}": 0.5 for k in range(8)}}, step=step, commit=True, time=1.0
            )
            if step % 97 == 0:
                while batch := reader.read(4096):
                    seen += [record.data["i"] for record in batch]
                assert seen[-1] == step
        assert reader.writer_alive()
        writer.close(0)
        while batch := reader.read():
            seen += [record.data["i"] for record in batch if record.kind is Kind.ROW]
        assert seen == list(range(6000))
        assert not reader.writer_alive()


def test_frames_can_be_forwarded_without_decoding(make_writer: MakeWriter) -> None:
    """Proves that raw frames cut anywhere between frames decode elsewhere into the very same records."""
    writer = make_writer()
    for step in range(500):
        writer.append_row({"x": float(step)} if step % 3 else {"x": float(step), "s": "t"}, step=step, commit=True, time=1.0)
    writer.close(0)
    decoder = FrameDecoder()
    forwarded: list[Record] = []
    with JournalReader.open(writer.path) as reader:
        offset: int | None = None
        while True:
            data, offset = reader.frames(offset, 300)
            if not data:
                break
            records, used = decoder.decode(data)
            assert used == len(data)
            forwarded += records
    assert forwarded == read_all(writer.path)


def test_threads_share_a_writer(make_writer: MakeWriter) -> None:
    """Proves that appends from several threads, with syncs between them, lose and mix up nothing."""
    writer = make_writer()

    def work(name: int) -> None:
        for i in range(400):
            writer.append_row({f"t{name}": i}, step=i, commit=True, time=1.0)
            if i % 100 == 0:
                writer.sync()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    rows = records_of(writer.path, Kind.ROW)
    assert all([row[f"t{name}"] for row in rows if f"t{name}" in row] == list(range(400)) for name in range(4))


# The writer's life --------------------------------------------------------------------------------------


def test_one_writer_a_journal(make_writer: MakeWriter) -> None:
    """Proves that a journal is never opened twice for writing, and that the refused try does not drop the first one's lock."""
    writer = make_writer()
    with pytest.raises(UsageError, match="exists"):
        make_writer()
    assert seen_alive(writer.path)
    writer.close(0)
    assert not seen_alive(writer.path)
    assert not lock_path(writer.path).exists()


def test_asking_in_the_writers_own_process_keeps_the_lock(make_writer: MakeWriter) -> None:
    """Proves that `writer_alive` in the writer's process does not drop its lock (closing any descriptor of it would)."""
    writer = make_writer()
    assert writer_alive(writer.path)
    assert seen_alive(writer.path)


def test_a_forked_child_is_refused_and_harms_nothing(make_writer: MakeWriter) -> None:
    """Proves that a forked child that logs on its parent's writer gets a clear error, and harms neither file nor lock."""
    writer = make_writer()
    writer.append_row({"x": 1.0}, step=0, commit=True, time=1.0)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:  # whatever happens, the child must not go on as a second test process
            said = []
            for call in (
                lambda: writer.append_row({"x": 2.0}, step=1, commit=True, time=1.0),
                lambda: writer.append(Kind.PREEMPTING, {}),
                writer.sync,
            ):
                try:
                    call()
                    said.append("nothing")
                except UsageError as error:
                    said.append(str(error))
            writer.close(0)
            os.write(write_end, "\n".join(said).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read().splitlines()
    os.waitpid(pid, 0)
    assert len(said) == 3
    assert all("forked child" in line for line in said), said
    writer.append_row({"x": 3.0}, step=1, commit=True, time=1.0)
    assert records_of(writer.path, Kind.ROW) == [{"x": 1.0}, {"x": 3.0}]
    assert seen_alive(writer.path)


def test_find_journals(make_writer: MakeWriter, tmp_path: Path) -> None:
    """Proves that journals are found from a file, a run directory, or the directory of all runs."""
    paths = []
    for run in ("run-1", "run-2"):
        (tmp_path / "wandb" / run).mkdir(parents=True)
        paths.append(make_writer(directory=tmp_path / "wandb" / run).path)
    assert find_journals(tmp_path / "wandb") == paths
    assert find_journals(tmp_path / "wandb" / "run-2") == paths[1:]
    assert find_journals(paths[0]) == paths[:1]
    assert find_journals(tmp_path / "nothing") == []


@pytest.mark.parametrize("content", [b"", b"hello", b"WBDJ\r\n\x1a\n", b"WBDJ\r\n\x1a\n\x02\x00" + bytes(30)])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    """Proves that files without a whole, verified header raise JournalCorruptError naming the file."""
    path = tmp_path / "x.wbdj"
    path.write_bytes(content)
    with pytest.raises(JournalCorruptError, match=r"x\.wbdj"):
        JournalReader.open(path)
