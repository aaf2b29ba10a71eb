"""The compiled maker of rows' frames: it does what the one in Python does, bit for bit, and nothing when it does not apply."""

from __future__ import annotations

import math
import shutil
import sys
import sysconfig
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbdist.run import journal_shapes
from wbdist.run.journal import JournalReader, JournalWriter, Kind
from wbdist.run.journal_format import FRAME_HEAD, FrameDecoder, JournalHeader, Schema, encode_frame
from wbdist.run.journal_shapes import NO_SHAPE, Shape

HEADER = JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n", writer="w")
COMMITS = int(Kind.ROW_PACKED_COMMIT)

needs_compiled = pytest.mark.skipif(not journal_shapes.COMPILED, reason="built without a compiler")

keys = st.text(max_size=12)
numbers = st.floats(width=64) | st.integers(-(1 << 63), (1 << 63) - 1) | st.booleans()
others = st.integers() | st.none() | st.text(max_size=3) | st.just(np.float64(1.5)) | st.just([1.0]) | numbers


def made_by(filler: Any, schema: Schema, calls: list[tuple[Any, ...]]) -> list[tuple[bool, bytes]]:
    frame = bytearray(FRAME_HEAD.size + schema.packed.size)
    fill = filler(schema, frame)
    return [(fill(*call), bytes(frame)) for call in calls]


def schema_of(row: Mapping[str, Any]) -> Schema:
    return Schema(7, tuple(row), "".join(Schema.CODES[type(value)] for value in row.values()))


def test_it_is_compiled_where_it_can_be() -> None:
    """Proves that no build on a machine with a compiler goes without it silently."""
    compiler = str(sysconfig.get_config_var("CC") or "cc").split()[0]
    if not (shutil.which(compiler) and Path(sysconfig.get_path("include"), "Python.h").exists()):
        pytest.skip("no compiler, or no header files of Python")
    assert journal_shapes.COMPILED
    assert "_packing" in type(Shape(schema_of({"a": 1.0})).fill.__self__).__module__  # type: ignore[attr-defined]


@needs_compiled
@given(
    row=st.dictionaries(keys, numbers, max_size=8),
    change=st.dictionaries(keys, others, max_size=2),
    seq=st.integers(-1, 1 << 33),
    step=st.integers(-1, 1 << 33),
    time=st.floats(0, 1e12),
    shuffle=st.booleans(),
)
def test_bit_for_bit(row: dict[str, Any], change: dict[str, Any], seq: int, step: int, time: float, shuffle: bool) -> None:
    """Proves that both say the same of any dict, make the same frame, which is that of `encode`, and that a row which is
    refused leaves no trace that could be taken for a row."""
    schema = schema_of(row)
    second = dict(reversed(row.items())) if shuffle else row
    calls = [(row, 5, COMMITS, 9, 1.5), ({**second, **change}, seq, COMMITS, step, time)]
    ours, theirs = (made_by(f, schema, calls) for f in (journal_shapes.compiled_filler, journal_shapes.python_filler))
    assert [said for said, _ in ours] == [said for said, _ in theirs]
    assert ours[0] == theirs[0] == (True, encode_frame(schema.encode(5, COMMITS, 9, 1.5, tuple(row.values()))))
    if ours[1][0]:
        assert ours[1] == theirs[1]
    else:
        assert ours[1][1] == ours[0][1]
        assert theirs[1][1] in {theirs[0][1], bytes(len(theirs[0][1]))}


@needs_compiled
@pytest.mark.parametrize(
    "data",
    [
        {"a": 1.0},
        {"a": 1.0, "b": 2, "c": True, "d": 0.0},
        {"b": 2, "a": 1.0, "c": True},
        {"a": 1, "b": 2, "c": True},
        {"a": 1.0, "b": True, "c": True},
        {"a": 1.0, "b": 1 << 63, "c": True},
        {"a": 1.0, "b": 2, "c": 1},
        {"a": np.float64(1.0), "b": 2, "c": True},
        {"a": 1.0, "b": 2, 3: True},
        OrderedDict(a=1.0, b=2, c=True),
        [("a", 1.0)],
        None,
    ],
)
def test_what_it_does_not_take(data: Any) -> None:
    """Proves that what is not exactly the shape's row changes nothing."""
    calls = [({"a": 0.5, "b": -1, "c": False}, 5, COMMITS, 9, 1.5), (data, 6, COMMITS, 10, 2.5)]
    first, second = made_by(journal_shapes.compiled_filler, schema_of(calls[0][0]), calls)
    assert first[0]
    assert second == (False, first[1])
    assert not NO_SHAPE.fill({}, 0, COMMITS, 0, 1.0)


@needs_compiled
def test_it_keeps_nothing_and_refuses_what_cannot_be() -> None:
    """Proves that it holds on to no row and no value, and gives its keys back; a wrong frame is an error, not a crash."""
    from wbdist.run._packing import Packer

    key, value = "k" * 20 + str(id(calls := [])), math.sqrt(2)
    before = sys.getrefcount(key), sys.getrefcount(value)
    row = {key: value}
    schema = schema_of(row)
    frame = bytearray(FRAME_HEAD.size + schema.packed.size)
    packer = Packer(schema.keys, schema.codes, 7, frame)
    calls += [packer.fill(row, seq, COMMITS, seq, 1.0) for seq in range(1000)]
    assert all(calls)
    with pytest.raises(BufferError):
        frame.append(0)
    del packer, row, schema
    frame.append(0)
    assert (sys.getrefcount(key), sys.getrefcount(value)) == before
    for arguments in (
        (("a",), "d", 7, bytearray(34)),
        (("a",), "dd", 7, bytearray(43)),
        (("a",), "s", 7, bytearray(35)),
        ((1,), "d", 7, bytearray(35)),
        (("a",), "d", 7, bytes(35)),
        (["a"], "d", 7, bytearray(35)),
    ):
        with pytest.raises((TypeError, ValueError, BufferError)):
            Packer(*arguments)
    with pytest.raises(TypeError, match="takes data, seq"):
        Packer(("a",), "d", 7, bytearray(35)).fill({"a": 1.0})  # type: ignore[call-arg]
    assert Packer.__new__(Packer).fill({}, 0, 0, 0, 0.0) is False


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiled), False])
def test_rows_of_every_kind_of_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Proves that `log` journals what any mapping holds when it is called, by either way, and the summary with it."""
    monkeypatch.setattr(journal_shapes, "COMPILED", compiled)
    counted: defaultdict[str, float] = defaultdict(float, a=3.0, b=4)
    big = {"a": 1.0, "b": 1 << 40}
    given = [
        {"a": 1.0, "b": 2},
        OrderedDict(b=2, a=1.0),
        counted,
        MappingProxyType({"a": 5.0, "b": 6}),
        big,
        {"a": 7.0, "b": 8},
    ]
    with JournalWriter.create(tmp_path / "w.a1.wbdj", HEADER) as writer:
        for row in given * 2:
            assert writer.log(row)
        counted["a"] = big["a"] = -1.0  # what a script does with its dicts later
        assert writer.summary() == {"a": 7.0, "b": 8}
        writer.log(counted)
        counted["a"] = -2.0
        assert writer.summary() == {"a": -1.0, "b": 4}
    with JournalReader.open(tmp_path / "w.a1.wbdj") as reader:
        rows = [record.data for record in reader.read() if record.kind is Kind.ROW]
    expected = [{"a": 1.0, "b": 2}, {"b": 2, "a": 1.0}, {"a": 3.0, "b": 4}, {"a": 5.0, "b": 6}, {"a": 1.0, "b": 1 << 40}]
    assert rows == [*expected, {"a": 7.0, "b": 8}] * 2 + [{"a": -1.0, "b": 4}]


SHAPES = [{"a": 0.0}, {"a": 0.0, "b": 0}, {"b": 0, "c": False}, {"c": "text"}, {"a": 0}, {"b": None, "c": 1.5}]


@given(st.lists(st.tuples(st.integers(0, len(SHAPES) - 1) | st.just("set"), st.integers(1, 9), st.booleans()), max_size=30))
def test_the_summary_of_rows_of_many_shapes(calls: list[tuple[Any, int, bool]]) -> None:
    """Proves that the summary is that of all rows in their order, whenever it is asked for, though most are never looked at."""
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, JournalWriter.create(Path(folder, "w.a1.wbdj"), HEADER) as writer:
        for which, value, asked in calls:
            if which == "set":
                writer.append(Kind.SUMMARY, {"set": {"b": -value}, "delete": ["a"]})
                expected = {key: each for key, each in expected.items() if key != "a"} | {"b": -value}
            else:
                row = {key: each if each is None else type(each)(value) for key, each in SHAPES[which].items()}
                writer.log(row)
                expected |= {key: each for key, each in row.items() if each is not None}
            if asked:
                assert writer.summary() == expected
        assert writer.summary() == expected
    assert writer.summary() == expected


@needs_compiled
def test_frames_are_read_back() -> None:
    """Proves that a reader verifies them: length and check are those that it expects."""
    row = {"x": math.nan, "n": -(1 << 63), "b": False}
    schema = schema_of(row)
    ((said, frame),) = made_by(journal_shapes.compiled_filler, schema, [(row, 1, COMMITS, 4, 2.5)])
    declared = encode_frame(b"\0\0\0\0" + bytes([Kind.SCHEMA]) + schema.describe())
    (record,), end = FrameDecoder().decode(declared + frame)
    assert said
    assert end == len(declared) + len(frame)
    assert (record.step, record.time, record.commit) == (4, 2.5, True)
    assert math.isnan(record.data.pop("x"))
    assert record.data == {"n": -(1 << 63), "b": False}
