"""W&B's step rule and the summary, as pure values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wbdist.core.rows import RowAssembler, StepRule
from wbdist.core.summary import SummaryTracker

CALLS = st.lists(st.tuples(st.none() | st.integers(0, 12), st.none() | st.booleans()), max_size=25)


def assemble(calls: list[tuple[dict[str, Any], int | None, bool | None]], **options: Any) -> list[dict[str, Any]]:
    assembler = RowAssembler(**options)
    rows = [row for data, step, commit in calls for row in assembler.add(data, step, commit, 0.0)]
    return rows + assembler.close()


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in {"_timestamp", "_runtime"}} for row in rows]


@pytest.mark.parametrize(
    ("calls", "rows"),
    [
        ([({"a": 1}, None, None), ({"a": 2}, None, None)], [{"a": 1, "_step": 0}, {"a": 2, "_step": 1}]),
        ([({"a": 1}, None, False), ({"b": 2}, None, None)], [{"a": 1, "b": 2, "_step": 0}]),
        ([({"a": 1}, 5, None), ({"b": 2}, 5, None), ({"c": 3}, 7, None)], [{"a": 1, "b": 2, "_step": 5}, {"c": 3, "_step": 7}]),
        ([({"a": 1}, 5, True), ({"b": 2}, 5, None), ({"c": 3}, 6, True)], [{"a": 1, "_step": 5}, {"c": 3, "_step": 6}]),
        ([({"a": 1}, 3, None), ({"b": 2}, 2, None), ({"c": 3}, None, True)], [{"a": 1, "c": 3, "_step": 3}]),
        ([({}, None, True)], [{"_step": 0}]),
        ([({"a": {"x": 1}}, 0, False), ({"a": {"y": 2}}, 0, True)], [{"a": {"x": 1, "y": 2}, "_step": 0}]),
        ([({"a": {"_type": "h", "v": 1}}, 0, False), ({"a": {"_type": "h"}}, 0, True)], [{"a": {"_type": "h"}, "_step": 0}]),
    ],
)
def test_calls_become_rows(calls: list[Any], rows: list[dict[str, Any]]) -> None:
    """Proves W&B's rule case by case: merging, closing by a later step, dropping earlier steps, commit, nested values."""
    assert bare(assemble(calls)) == rows


@settings(deadline=None)
@given(calls=CALLS, start=st.integers(0, 5))
def test_the_arithmetic_agrees_with_the_assembler(calls: list[tuple[int | None, bool | None]], start: int) -> None:
    """Proves that `StepRule`, with which a client counts, numbers and counts the very rows that `RowAssembler` makes, that
    steps only grow, and that feeding back the resolved (step, commit) changes nothing."""
    rule = StepRule(start)
    assembler, resolved = RowAssembler(starting_step=start), RowAssembler(starting_step=start)
    rows: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    for step, commit in calls:
        rows += assembler.add({"v": 1}, step, commit, 0.0)
        if (accepted := rule.accept(step, commit)) is not None:
            again += resolved.add({"v": 1}, *accepted, 0.0)
        assert rule.rows == len(rows) == assembler.rows
        assert rule.last_step == (rows[-1]["_step"] if rows else start - 1)
    rows += assembler.close()
    again += resolved.close()
    rule.close()
    assert rule.rows == len(rows)
    assert rows == again
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert all(step >= start for step in steps)


def test_time_fields() -> None:
    """Proves that a row's time is its last call's, and that `_runtime` goes on from where the earlier attempt stood."""
    assembler = RowAssembler(created=1000.0, runtime=50.0)
    assembler.add({"a": 1}, 0, False, 1001.0)
    (row,) = assembler.add({"b": 1}, 0, True, 1002.5)
    assert (row["_timestamp"], row["_runtime"]) == (1002.5, 52.5)


def test_summary_keeps_last_values() -> None:
    """Proves that the summary has each key's last value, None changes nothing, hand-made changes go between rows."""
    tracker = SummaryTracker({"old": 1})
    tracker.add_row({"loss": 1.0, "n": {"a": 1, "b": None}, "_step": 0})
    tracker.change({"best": 0.5, "loss": 9.0})
    tracker.add_row({"loss": math.inf, "acc": None, "n": {"b": 2}, "_step": 1})
    tracker.change({}, ["old"])
    assert tracker.values == {"loss": math.inf, "n": {"a": 1, "b": 2}, "best": 0.5, "_step": 1}
