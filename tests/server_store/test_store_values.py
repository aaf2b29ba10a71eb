"""What goes in comes out: types, bits and strings, through every level of chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.storing import StoredRun, exactly

from wbdist.core.position import CONSOLE, EVENTS, HISTORY
from wbdist.server.store import SqlStore, columns, open_store

TEXT = st.text(st.characters(codec=None), max_size=6)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(width=64),
    TEXT,
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
KINDS = st.sampled_from([st.floats(), st.integers(-(2**63), 2**63 - 1), st.integers() | st.floats(), VALUES])
KEYS = st.one_of(st.sampled_from(["a", "b", "c"]), TEXT)


@st.composite
def row_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows whose keys come and go, and mostly keep to one type a key."""
    keys = draw(st.lists(KEYS, min_size=1, max_size=4, unique=True))
    kinds = {key: draw(KINDS) for key in keys}
    one = st.fixed_dictionaries({}, optional=kinds)
    return draw(st.lists(one, max_size=40))


@given(row_lists(), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_columns_keep_every_value(rows: list[dict[str, Any]], portions: list[int]) -> None:
    """Splitting, packing, joining side by side and unpacking give back the same rows, bit by bit."""
    parts = []
    rest = list(rows)
    while rest:
        size = portions[len(parts) % len(portions)]
        parts.append(rest[:size])
        rest = rest[size:]
    packed = [(len(part), columns.unpack_all(columns.pack_all(columns.split(part)))) for part in parts]
    names = dict.fromkeys(name for _, part in packed for name in part)
    whole = {name: columns.concat([(count, part.get(name)) for count, part in packed]) for name in names}
    whole = {name: columns.unpack(columns.pack(column)) for name, column in whole.items()}
    assert exactly(columns.join(whole, 0, len(rows))) == exactly(rows)
    middle = len(rows) // 3, len(rows) - len(rows) // 4
    assert exactly(columns.join(whole, *middle)) == exactly(rows[middle[0] : middle[1]])


def test_booleans_among_numbers_stay_booleans() -> None:
    """True is a number to Python, and is not to become one here, in whatever company it comes."""
    for values in ([1, 2.5, True], [0.5, False], [3, True], [True, False], [1, 2.5, 2**53, -(2**53) - 1]):
        rows = [{"a": value} for value in values]
        stored = columns.unpack_all(columns.pack_all(columns.split(rows)))
        assert exactly(columns.join(stored, 0, len(rows))) == exactly(rows)


@pytest.mark.usefixtures("tiny")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=row_lists(), portion=st.integers(1, 7))
def test_history_keeps_every_value(rows: list[dict[str, Any]], portion: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lines as the SDK writes them, in portions and merged on the way, are read as the same values."""
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('values') / 'store.db'}")
    run = StoredRun(store)
    for at in range(0, len(rows), portion):
        assert run.append(None, at, rows[at : at + portion]).code == ""
    assert exactly(run.history()) == exactly(rows)
    store.close()


def test_awkward_lines_on_every_database(store: SqlStore) -> None:
    """What JSON may hold and databases may not: NUL, lone surrogates, bare NaN and Infinity, integers beyond 64 bits."""
    run = StoredRun(store)
    line = '{"_step":0,"a\\u0000b":NaN,"\\ud800":-Infinity,"big":123456789012345678901234567890,"neg":-0.0,"\\u001ax":1e5}'
    store.append(run.pk, {HISTORY: (0, [line]), CONSOLE: (0, ["nul \x00 and \udc80 and \x1a", ""])}, 1.0)
    expected = json.loads(line)
    assert exactly(run.history()) == exactly([expected])
    assert store.console(run.pk) == ["nul \x00 and \udc80 and \x1a", ""]
    assert [b.last for b in store.series(run.pk, "\ud800")] == [float("-inf")]
    assert run.row.metrics == sorted(["a\x00b", "\ud800", "big", "neg", "\x1ax"])


@pytest.mark.parametrize(
    ("line", "word"),
    [("{", "not JSON"), ("[1]", "must be a JSON object"), ('{"a":' + "[" * 300 + "]" * 300 + "}", "nested"), ("", "not JSON")],
)
def test_a_bad_line_is_named_and_nothing_is_stored(store: SqlStore, line: str, word: str) -> None:
    """A request with one line that is not a JSON object stores none of its lines, of any stream."""
    run = StoredRun(store)
    with pytest.raises(ValueError, match=f"line 1 of {HISTORY}.*{word}"):
        store.append(run.pk, {EVENTS: (0, ['{"x":1}']), HISTORY: (0, ['{"_step":0}', line])}, 1.0)
    assert (run.history(), run.history(stream=EVENTS), run.row.line_counts) == ([], [], {})


def test_large_chunks_are_small_on_disk(tmp_path: Path) -> None:
    """Ten metrics cost less than 8 bytes a value on disk, even noise appended in small portions."""
    store = open_store(f"sqlite:///{tmp_path / 'store.db'}")
    run = StoredRun(store)
    count = 4_000
    for at in range(0, count, 20):
        lines = [
            {"_step": s, **{f"m{k}": (s * 7919 + k * 104729) % 10007 / 10007 for k in range(10)}} for s in range(at, at + 20)
        ]
        run.append(None, at, lines)
    store.close()
    assert (tmp_path / "store.db").stat().st_size < 8 * 11 * count
