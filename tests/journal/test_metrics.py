"""Defined metrics and the summary as pure values, against a reference that keeps every row and computes from all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.examples import examples

from wbdist.core.metrics import OPERATIONS, Definitions, from_wandb
from wbdist.core.rows import RowAssembler
from wbdist.core.summary import INTERNAL, SummaryTracker

KEYS = ("loss", "val/a", "val/b", "epoch")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.sampled_from([0.5, math.inf, math.nan, "text", {"_type": "histogram"}])
)
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
DEFINE = st.fixed_dictionaries(
    {"name": st.sampled_from([*KEYS, "val/*", "*"])},
    optional={
        "summary": st.lists(st.sampled_from(OPERATIONS), unique=True, max_size=3),
        "goal": st.sampled_from(["min", "max"]),
        "step_metric": st.sampled_from(["epoch", "val/b"]),
        "step_sync": st.booleans(),
        "overwrite": st.booleans(),
    },
)
BY_HAND = st.tuples(st.dictionaries(st.sampled_from(KEYS), st.integers(50, 60), max_size=2), st.lists(st.sampled_from(KEYS)))
EVENTS = st.lists(st.one_of(ROWS.map(lambda row: ("row", row)), BY_HAND.map(lambda change: ("hand", change))), max_size=20)


def expected(definitions: list[dict[str, Any]], events: list[tuple[str, Any]]) -> dict[str, Any]:
    """The summary, key by key, from everything that happened."""
    rules: dict[str, dict[str, Any]] = {}
    for call in definitions:
        old = {} if call.get("overwrite") else rules.get(call["name"], {})
        rules[call["name"]] = {**old, **call}
    found = {}
    for key in KEYS:
        names = [key, *sorted((n for n in rules if n.endswith("*") and key.startswith(n[:-1])), key=len, reverse=True)]
        rule = next((rules[name] for name in names if name in rules), {})
        operations = set(rule.get("summary", ()))
        seen: list[Any] = []
        by_hand: list[int] = []
        for what, data in events:
            if what == "row" and data.get(key) is not None:
                seen.append(data[key])
            elif what == "hand":
                values, deleted = data
                if key in values or key in deleted:
                    seen = []
                    by_hand = [values[key]] if key in values and key not in deleted else []
        sized = [v for v in seen if type(v) in {int, float} and not math.isnan(v)]
        if operations <= {"copy"}:
            report: Any = seen[-1] if seen else None
        elif "none" in operations or not seen:
            report = None
        else:
            best = max if rule.get("goal") == "max" else min
            report = {"first": seen[0], "last": seen[-1]}
            if sized:
                report |= {
                    "min": min(sized),
                    "max": max(sized),
                    "best": best(sized),
                    "mean": sum(map(float, sized)) / len(sized),
                }
            report = {name: value for name, value in report.items() if name in operations} or None
        if by_hand and report is None:
            found[key] = by_hand[-1]
        elif report is not None:
            found[key] = report
    return found


@settings(deadline=None, max_examples=examples(150, 1000))
@example(definitions=[{"name": "*", "summary": ["none"]}, {"name": "loss"}], events=[("row", {"loss": 1})], cut=1)
@given(definitions=st.lists(DEFINE, max_size=4), events=EVENTS, cut=st.integers(0, 20))
def test_a_summary_is_what_all_rows_say_also_when_it_is_taken_over(
    definitions: list[dict[str, Any]], events: list[tuple[str, Any]], cut: int
) -> None:
    """Proves min, max, mean, first, last, best, none, copy, globs, merged and replaced definitions and changes by hand against
    the reference; and that a tracker which starts from the state of another says the same in the end, means included.

    A value set by hand stays until rows say something of what is asked: text says no minimum.
    A key set by hand before the cut is left out of the second half: what was by hand is not told to the next attempt.
    """
    whole = SummaryTracker()
    first = SummaryTracker()
    for call in definitions:
        whole.define(call)
        first.define(call)
    for tracker, part in ((whole, events), (first, events[:cut])):
        for what, data in part:
            tracker.add_row(data) if what == "row" else tracker.change(*data)
    assert repr(sorted(ordered(whole.values).items())) == repr(sorted(ordered(expected(definitions, events)).items()))

    if any(what == "hand" for what, _ in events[:cut]):
        return
    second = SummaryTracker(first.state())
    for call in from_wandb(first.definitions.to_wandb()):  # as a resumed run finds them in its config
        second.define(call)
    for what, data in events[cut:]:
        second.add_row(data) if what == "row" else second.change(*data)
    assert repr(sorted(ordered(second.values).items())) == repr(sorted(ordered(whole.values).items()))


def ordered(values: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(sorted(value.items())) if isinstance(value, dict) else value for key, value in values.items()}


@settings(deadline=None)
@given(definitions=st.lists(DEFINE, max_size=4), rows=st.lists(ROWS, max_size=12), cut=st.integers(0, 12))
def test_rows_get_the_last_step_metric(definitions: list[dict[str, Any]], rows: list[dict[str, Any]], cut: int) -> None:
    """Proves that a row lacks no step metric that any row before it had; that rows which need none stay as they are; and that
    rows behind a cut are completed from the summary there as they would have been without it."""
    calls = [call for call in definitions if "overwrite" not in call]
    known = Definitions()
    for call in calls:
        known.define(call)
    plain = [{key: value for key, value in row.items() if value is not None} for row in rows]

    last: dict[str, Any] = {}
    wanted: list[dict[str, Any]] = []
    for row in plain:
        asked = {rule.step_metric for key in row if (rule := known.of(key)) and rule.step_sync and rule.step_metric}
        filled = {**row, **{key: last[key] for key in asked if key in last and key not in row}}
        last |= filled
        wanted.append(filled)

    made: list[dict[str, Any]] = []
    summary: dict[str, Any] | None = None
    for part in (plain[:cut], plain[cut:]):
        assembler, tracker = RowAssembler(summary=summary), SummaryTracker(summary)
        for call in calls:
            assembler.define(call)
            tracker.define(call)
        for row in part:
            for done in assembler.add(row, None, None, 0.0):
                made.append({key: value for key, value in done.items() if key not in {"_step", "_timestamp", "_runtime"}})
                tracker.add_row(done)
        summary = tracker.state()
    assert repr([sorted(row.items()) for row in made]) == repr([sorted(row.items()) for row in wanted])


@given(definitions=st.lists(DEFINE, max_size=5))
def test_wandbs_form_says_the_same(definitions: list[dict[str, Any]]) -> None:
    """Proves that what is written to a config as W&B's list, read back, defines the same."""
    first, second = Definitions(), Definitions()
    for call in definitions:
        first.define(call)
    for call in from_wandb(first.to_wandb()):
        second.define(call)
    for key in (*KEYS, "_own", "other"):
        a, b = first.of(key), second.of(key)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.name, a.step_sync, a.hidden, set(a.summary), a.goal) == (
                b.name,
                b.step_sync,
                b.hidden,
                set(b.summary),
                b.goal,
            )
            assert a.step_metric == b.step_metric


def test_the_sdks_own_list_is_read() -> None:
    """Proves the reading of a list as the real SDK 0.31.0 sent it: escaped dots, globs, step metrics' places."""
    listed = [
        {"1": "s", "6": [3], "7": [1, 2, 3, 5, 8]},
        {"6": [3], "7": [2], "1": "dot\\.x"},
        {"1": "ig", "5": 4, "6": [3], "7": []},
        {"1": "zz", "6": [], "7": []},
        {"2": "v/*", "5": 6, "6": [1, 2], "7": [2]},
        {"1": "vs", "6": [], "7": []},
        {"7": [3], "2": "aa*", "6": []},
        "not an entry",
    ]
    assert from_wandb(listed) == [
        {"name": "s", "summary": ["min", "max", "mean", "last", "first"]},
        {"name": "dot.x", "summary": ["max"]},
        {"name": "ig", "step_metric": "zz"},
        {"name": "v/*", "step_metric": "vs", "step_sync": True, "hidden": True, "summary": ["max"]},
        {"name": "aa*", "summary": ["mean"]},
    ]
    assert from_wandb(None) == []


@pytest.mark.parametrize("prefix", ["*", "_*"])
def test_no_prefix_means_internal_keys(prefix: str) -> None:
    """Proves that `define_metric("*", summary="none")` leaves `_step` and its like in the summary."""
    tracker = SummaryTracker()
    tracker.define({"name": prefix, "summary": ["none"]})
    tracker.add_row({"_step": 3, "loss": 1})
    assert tracker.values["_step"] == 3
    assert ("loss" in tracker.values) == (prefix == "_*")


def test_a_run_without_definitions_has_no_internal_state() -> None:
    """Proves that nothing is added to summaries of runs which define nothing, and that what a base held is not shown."""
    tracker = SummaryTracker({"loss": 1, INTERNAL: {"runtime": 7}})
    tracker.add_row({"loss": 0.5})
    assert tracker.values == tracker.state() == {"loss": 0.5}


def test_one_nan_spoils_nothing() -> None:
    """Proves that min, max, mean and best are of the numbers, while first and last are whatever came."""
    tracker = SummaryTracker()
    tracker.define({"name": "loss", "summary": ["min", "max", "mean", "best", "first", "last"]})
    for value in (math.nan, 3, None, 1.0, "text", math.nan):
        tracker.add_row({"loss": value})
    report = tracker.values["loss"]
    assert (report["min"], report["max"], report["mean"], report["best"]) == (1.0, 3, 2.0, 1.0)
    assert math.isnan(report["first"])
    assert math.isnan(report["last"])
