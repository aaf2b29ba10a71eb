"""Reducers and alignment: pure, exact, independent of the order in which ranks arrive."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wbdist.core.reducers import NAMES, mean, reduce_rows, total
from wbdist.distributed.alignment import StepAligner


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
            assert {rank for rank, _, _ in entries} == logged[step]
            assert [rank for rank, _, _ in entries] == sorted(logged[step])
            assert all(at[rank] > step for rank in range(size)), "a rank could still have added to it"

    for rank, skip in events:
        rank %= size  # noqa: PLW2901
        step = at[rank] + skip
        logged.setdefault(step, set()).add(rank)
        at[rank] = step + 1
        aligner.add(rank, step, {"v": rank}, {})
        collect()
    at = [1 << 40] * size
    for rank in range(size):
        aligner.leave(rank)
    collect()
    assert out == sorted(logged)
