"""Reducers and alignment: pure, exact, independent of the order in which ranks arrive."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wbdist.core.reducers import NAMES, is_known, mean, reduce_rows, total
from wbdist.distributed.alignment import StepAligner
from wbdist.distributed.intake import FeedOps, FeedRow, FeedRows, Layouts
from wbdist.distributed.intake import reduced as reduced_rows
from wbdist.distributed.lateness import LatePolicy
from wbdist.errors import UsageError
from wbdist.run.journal import Schema


class Row(NamedTuple):
    rank: int


def reduced(op: str, *values: Any) -> Any:
    return reduce_rows([(rank, {"k": value}, {"k": op}) for rank, value in enumerate(values)])


@pytest.mark.parametrize(
    ("op", "values", "expected"),
    [
        ("mean", (1, 2), 1.5),
        ("mean", (2, 2), 2.0),
        ("mean", (2**60, 1 - 2**60), 0.5),
        ("mean", (True, False, False, False), 0.25),
        ("sum", (1, 2), 3),
        ("sum", (2**62, 2**62), 2**63),
        ("sum", (0.1, 0.2, 0.3), math.fsum((0.1, 0.2, 0.3))),
        ("min", (3, 1.0, 2), 1.0),
        ("max", (True, False), True),
        ("first", ("a", "b"), "a"),
        ("last", ("a", "b"), "b"),
        ("mean", ("a", "b"), "a"),
        ("mean", (1.0, "b"), 1.0),
        ("mean", (None, 4.0), 4.0),
        ("mean", (None, None), None),
        ("sum", (math.inf, 1), math.inf),
        ("mean", (1e308, 1e308), 1e308),
        ("sum", (1e308, 1e308, -1e308), 1e308),
        ("sum", (-1e308, -1e308), -math.inf),
        ("sum", (1e308, 1e308, -math.inf), -math.inf),
        ("p50", (3, 1, 2), 2.0),
        ("p50", (4.0, 1.0, 2.0, 3.0), 2.5),
        ("p0", (3, 1.0, 2), 1.0),
        ("p100", (3, 1, 2), 3.0),
        ("p90", (0, 10), 9.0),
        ("p99.9", (5.0,), 5.0),
        ("p50", (-math.inf, 1.0), -math.inf),
        ("p25", (1e308, -1e308), -5e307),
        ("p50", ("a", "b"), "a"),
    ],
)
def test_ops(op: str, values: tuple[Any, ...], expected: Any) -> None:
    """Proves each op on numbers, bools, None, text and at the edge of the floats; ints stay ints where they can."""
    (value,) = reduced(op, *values).values()
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("op", ["mean", "sum", "min", "max"])
def test_nan_propagates(op: str) -> None:
    """Proves that NaN on any rank shows, whatever the order; opposite infinities too, where they are added."""
    for values in ((math.nan, 1.0), (1.0, math.nan), (1, math.nan, 2)):
        assert math.isnan(reduced(op, *values)["k"])
    if op in ("mean", "sum"):
        assert math.isnan(reduced(op, math.inf, -math.inf)["k"])


def test_weights_and_the_spread_band() -> None:
    """Proves the mean by another key's weight (exact where floats are not), whoever lacks it, and the band the ranks lie in."""
    ops = {"loss": "weighted:n", "n": "sum", "t": "spread"}
    rows = [(0, {"loss": 1.0, "n": 1, "t": 1.0}, ops), (1, {"loss": 4.0, "n": 3, "t": 4.0}, ops)]
    assert reduce_rows(rows) == {"loss": 3.25, "n": 4, "t": 2.5, "t/min": 1.0, "t/max": 4.0}
    assert reduce_rows([*rows, (2, {"loss": 99.0, "n": None}, ops)])["loss"] == 3.25
    assert math.isnan(reduce_rows([(0, {"loss": 1.0, "n": 0}, ops)])["loss"])
    assert math.isnan(reduce_rows([*rows, (2, {"loss": math.nan, "n": 1}, ops)])["loss"])
    large = [(rank, {"loss": value, "n": 1e300}, ops) for rank, value in enumerate((1e300, -1e300, 3.0))]
    assert reduce_rows(large)["loss"] == 1.0
    assert reduce_rows([(0, {"t": "text"}, ops)]) == {"t": "text"}


def test_what_an_op_may_be() -> None:
    """Proves that what is no op is refused before it is journaled."""
    for op in (*NAMES[:7], "per_rank", "spread", "p0", "p99.9", "p100", "weighted:batch_size"):
        assert is_known(op), op
    for op in ("median", "p101", "p-1", "p", "p5x", "weighted", "weighted:", "", None, 3):
        assert not is_known(op), op


VALUES = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.sampled_from(["a", "b"]))
OPS = st.sampled_from(["mean", "sum", "min", "max", "first", "last", "p75", "sum53", "spread", "per_rank", "weighted:a"])


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, min_size=1), min_size=1, max_size=4),
    st.dictionaries(st.sampled_from("abc"), OPS),
)
@settings(max_examples=200, deadline=None)
def test_columns_are_as_rows(rows: list[dict[str, Any]], ops: dict[str, str]) -> None:
    """Proves that rows kept as columns give bit for bit what rows as dicts give, whatever the layouts and the ops."""
    layouts, kept = Layouts(), FeedOps(ops)
    codes = [("".join("d" if type(value) is float else "x" for value in row.values())) for row in rows]
    entries = [
        FeedRow(rank, layouts._get(tuple(row), code), tuple(row.values()), kept, 0.0)
        for rank, (row, code) in enumerate(zip(rows, codes, strict=True))
    ]
    asked = reduce_rows([(rank, row, ops) for rank, row in enumerate(rows)])
    got = reduced_rows(entries)
    assert list(map(repr, got.items())) == list(map(repr, asked.items()))


def test_calls_of_one_step_are_one_row() -> None:
    """Proves that calls of a step add up, also when they repeat a key, and that a row keeps the ops it was logged with."""
    rows = FeedRows(0, layouts := Layouts())
    a, b = (layouts.of(Schema(number, (key,), "d")) for number, key in enumerate("ab"))
    assert rows.add(a, (1.0,), 5, 1.0) is None
    assert rows.add(b, (2.0,), 5, 2.0) is None
    rows.ops = rows.ops.after({"a": "sum"})
    row = rows.add(a, (3.0,), 6, 3.0)
    assert row is not None
    assert (row.as_dict(), row.ops.of, row.time) == ({"a": 1.0, "b": 2.0}, {}, 2.0)
    assert rows.add(a, (4.0,), 6, 4.0) is None
    assert rows.add(None, {"n": {"x": [1]}}, 6, 5.0) is None
    row = rows.close()
    assert row is not None
    assert (row.as_dict(), row.ops.of, rows.step) == ({"a": 4.0, "n": {"x": [1]}}, {"a": "sum"}, None)


def test_per_rank_and_keys_of_some_ranks() -> None:
    """Proves per-rank columns, that a key is reduced over the ranks that have it, and the order of the columns."""
    rows = [(0, {"a": 1.0, "p": 5}, {"p": "per_rank"}), (2, {"b": 4.0, "a": 3.0, "p": 6}, {"p": "per_rank"})]
    assert list(reduce_rows(rows).items()) == [("a", 2.0), ("p/rank0", 5), ("p/rank2", 6), ("b", 4.0)]
    assert {"mean", "sum", "min", "max", "first", "last", "per_rank"} <= set(NAMES)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9), st.randoms())
@settings(max_examples=200, deadline=None)
def test_sums_are_exact_in_any_order(values: list[float], dice: random.Random) -> None:
    """Proves that sum and mean are the correctly rounded results, so no order of the ranks changes a bit."""
    shuffled = list(values)
    dice.shuffle(shuffled)
    exact = sum(map(Fraction, values), Fraction(0))
    try:
        expected = float(exact)
    except OverflowError:
        expected = math.inf if exact > 0 else -math.inf
    assert total(values) == expected
    assert total(shuffled) == expected
    assert mean(values) == mean(shuffled)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_alignment_gives_each_step_once_complete_and_in_order(events: list[tuple[int, int]], size: int) -> None:
    """Proves, for any interleaving of ranks that skip steps at will, that steps come out once, in order, with all rows."""
    aligner = StepAligner(size, 0)
    at = [0] * size
    logged: dict[int, set[int]] = {}
    out: list[int] = []

    def collect() -> None:
        for step, entries in aligner.complete():
            out.append(step)
            assert {row.rank for row in entries} == logged[step]
            assert [row.rank for row in entries] == sorted(logged[step])
            assert all(at[rank] > step for rank in range(size)), "a rank could still have added to it"

    for rank, skip in events:
        rank %= size  # noqa: PLW2901
        step = at[rank] + skip
        logged.setdefault(step, set()).add(rank)
        at[rank] = step + 1
        aligner.add(step, Row(rank))
        collect()
    at = [1 << 40] * size
    for rank in range(size):
        aligner.leave(rank)
    collect()
    assert out == sorted(logged)


@pytest.mark.parametrize("given", [{"quorum": 0}, {"quorum": True}, {"quorum": 1.5}, {"quorum": 2, "patience": -1.0}])
def test_late_policies_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"(quorum|patience)="):
        LatePolicy(**{"patience": 1.0} | given)


def test_quorum_of_the_ranks_that_are_left() -> None:
    """Proves how many ranks a quorum is, and that ranks that are gone do not count for it."""
    assert [LatePolicy(0.75, 0).ranks(size) for size in (1, 2, 4, 8)] == [1, 2, 3, 6]
    assert [LatePolicy(3, 0).ranks(size) for size in (1, 4)] == [1, 3]
    aligner: StepAligner[Row] = StepAligner(4, 0)
    for rank, step in enumerate((9, 7, 5, 3)):
        aligner.passed(rank, step)
    assert aligner.passed_by(LatePolicy(0.75, 0).ranks) == 5
    aligner.leave(0)
    assert aligner.passed_by(LatePolicy(2, 0).ranks) == 5
