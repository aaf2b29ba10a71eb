"""Many ranks' values of one step, made one: exact, and the same whatever order they arrived in.

| op               | numbers                             | anything else      | why                                           |
|------------------|-------------------------------------|--------------------|-----------------------------------------------|
| `mean`           | math.fsum / n, always a float       | as `first`         | correctly rounded sum: no order dependence    |
| `sum`            | math.fsum; ints stay ints           | as `first`         |                                               |
| `min, max`       | of all; ints stay ints              | as `first`         | NaN wins: Python's min() depends on the order |
| `first`          | the lowest rank's                   | the lowest rank's  | for what is alike on all ranks, such as `lr`  |
| `last`           | the highest rank's                  | the highest rank's |                                               |
| `p0` ... `p100`  | percentile, linear between values   | as `first`         | `p50` is the median; `p99.9` is allowed       |
| `weighted:<key>` | mean, weighted by the rank's `<key>`| as `first`         | uneven batches: `weighted:batch_size`         |
| `spread`         | mean, and `<key>/min`, `<key>/max`  | as `first`         | the band that the ranks lie in                |
| `sum53`          | ints, modulo 2**53                  | as `first`         | fingerprints: exact in a float64, any split   |
| `per_rank`       | `<key>/rank<k>` for each            | same               |                                               |

NaN propagates. None counts as not logged, unless no rank logged anything else. A bool is a number (the mean of a flag
is the share of ranks that set it), except to `min` and `max`, which return one of the bools. A rank whose weight is missing
or no number counts as not having logged; weights that add up to 0 give NaN.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

from wbdist.core.floats import nearest_float

DEFAULT: Final = "mean"
PER_RANK: Final = "per_rank"
SPREAD: Final = "spread"
WEIGHTED: Final = "weighted:"

_FLOATS: Final = {float}

Ops = Mapping[str, str]
"""key -> op, for the keys whose op is not DEFAULT."""
Reducer = Callable[[Sequence[Any]], Any]


def is_known(op: object) -> bool:
    """Whether `op` is one of the module's table."""
    if not isinstance(op, str):
        return False
    return op in {PER_RANK, SPREAD} or (op.startswith(WEIGHTED) and len(op) > len(WEIGHTED)) or reducer(op) is not None


@functools.lru_cache(maxsize=1024)
def reducer(op: str) -> Reducer | None:
    """What makes one value of a column; None for an op that takes more than the column, or makes more than one value."""
    if (found := _OPS.get(op)) is not None:
        return found
    match = re.fullmatch(r"p(\d{1,3}(?:\.\d{1,9})?)", op)
    if match is None or (share := Fraction(match[1]) / 100) > 1:
        return None
    return functools.partial(percentile, share)


class Columns:
    """How rows of the same keys become one, column by column; made once for a layout of rows and the ops that hold for it."""

    __slots__ = ("_floats", "_reducers", "keys")

    def __init__(self, keys: tuple[str, ...], reducers: list[Reducer], *, floats: bool) -> None:
        self.keys = keys
        self._reducers = reducers
        self._floats = floats

    @classmethod
    def of(cls, keys: tuple[str, ...], ops: Ops, *, floats: bool) -> Columns | None:
        """`floats`: all values of all rows are. None when an op needs more than its column."""
        reducers = [reducer(ops.get(key, DEFAULT)) for key in keys]
        known = [found for found in reducers if found is not None]
        if len(known) < len(reducers):
            return None
        return cls(keys, known, floats=floats and all(found is mean for found in known))

    def reduce(self, rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """One row of at least one, in rank order."""
        columns = zip(*rows, strict=True)
        if self._floats:
            count, fsum = len(rows), math.fsum
            try:
                return dict(zip(self.keys, [fsum(column) / count for column in columns], strict=True))
            except (ValueError, OverflowError):
                columns = zip(*rows, strict=True)
        values = [reduce(column) for reduce, column in zip(self._reducers, columns, strict=True)]
        return dict(zip(self.keys, values, strict=True))


def reduce_rows(rows: Sequence[tuple[int, Mapping[str, Any], Ops]]) -> dict[str, Any]:
    """One row of all ranks' rows of a step: (rank, data, that rank's ops), at least one, in rank order.

    A key is reduced over the ranks that logged it, by the op that the lowest of them gave. Keys keep the order in which the
    ranks, lowest first, bring them up.
    """
    out: dict[str, Any] = {}
    for key in dict.fromkeys(key for _, row, _ in rows for key in row):
        having = [entry for entry in rows if key in entry[1]]
        op = having[0][2].get(key, DEFAULT)
        if op == PER_RANK:
            out.update((f"{key}/rank{rank}", row[key]) for rank, row, _ in having)
            continue
        values = [row[key] for _, row, _ in having]
        if op == SPREAD:
            out[key] = mean(values)
            if _numbers(values):
                out[f"{key}/min"], out[f"{key}/max"] = smallest(values), largest(values)
        elif op.startswith(WEIGHTED):
            out[key] = weighted(values, [row.get(op.removeprefix(WEIGHTED)) for _, row, _ in having])
        else:
            reduce = reducer(op)
            assert reduce is not None, f"{op} was not checked"
            out[key] = reduce(values)
    return out


def mean(values: Sequence[Any]) -> Any:
    if {*map(type, values)} == _FLOATS:
        try:
            return math.fsum(values) / len(values)
        except (ValueError, OverflowError):
            return _beyond_floats(values, len(values))
    return _any_mean(values)


def _any_mean(values: Sequence[Any]) -> Any:
    numbers = _numbers(values)
    if not numbers:
        return values[0]
    count = len(numbers)
    try:
        if all(isinstance(value, int) for value in numbers):
            return sum(numbers) / count  # exact: Python rounds the quotient of two ints once
        return math.fsum(numbers) / count
    except (OverflowError, ValueError):
        return _beyond_floats(numbers, count)


def total(values: Sequence[Any]) -> Any:
    numbers = _numbers(values)
    if not numbers:
        return values[0]
    if all(isinstance(value, int) for value in numbers):
        return sum(numbers)
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):
        return _beyond_floats(numbers, 1)


def _beyond_floats(numbers: Sequence[Any], count: int) -> float:
    """The sum over `count` where fsum gives up: opposite infinities, or a partial sum outside the floats."""
    special = [value for value in numbers if isinstance(value, float) and not math.isfinite(value)]
    if special:
        return float(sum(special))
    return nearest_float(Fraction(sum(map(Fraction, numbers))) / count)


def fingerprint(values: Sequence[Any]) -> Any:
    numbers = _numbers(values)
    if not numbers or not all(isinstance(value, int) for value in numbers):
        return values[0]
    return sum(numbers) % 2**53


def smallest(values: Sequence[Any]) -> Any:
    return _extreme(values, min)


def largest(values: Sequence[Any]) -> Any:
    return _extreme(values, max)


def _extreme(values: Sequence[Any], choose: Callable[[Iterable[Any]], Any]) -> Any:
    numbers = _numbers(values)
    if not numbers:
        return values[0]
    for value in numbers:
        if value != value:  # noqa: PLR0124  (NaN; math.isnan refuses ints beyond the floats)
            return value
    return choose(numbers)


def percentile(share: Fraction, values: Sequence[Any]) -> Any:
    """Linear between the two nearest, as numpy's default; of one value that value. NaN wins."""
    numbers = _numbers(values)
    if not numbers:
        return values[0]
    for value in numbers:
        if value != value:  # noqa: PLR0124
            return value
    ordered = sorted(numbers)
    place = share * (len(ordered) - 1)
    below = int(place)
    low, part = ordered[below], place - below
    if part == 0 or ordered[below + 1] == low:
        return float(low)
    high = ordered[below + 1]
    if isinstance(low, float) and math.isinf(low):
        return math.nan if high == -low else low
    if isinstance(high, float) and math.isinf(high):
        return high
    return nearest_float((1 - part) * Fraction(low) + part * Fraction(high))


def weighted(values: Sequence[Any], weights: Sequence[Any]) -> Any:
    """Sum of value * weight over the sum of weights, rounded once."""
    if not _numbers(values):
        return values[0]
    pairs = [
        (value, weight)
        for value, weight in zip(values, weights, strict=True)
        if value is not None and isinstance(weight, int | float)
    ]
    if not all(math.isfinite(number) for pair in pairs for number in pair if isinstance(number, float)):
        above, below = sum(float(value) * float(weight) for value, weight in pairs), sum(float(weight) for _, weight in pairs)
        return above / below if below else math.nan
    total_weight = sum((Fraction(weight) for _, weight in pairs), Fraction())
    if total_weight == 0:
        return math.nan
    return nearest_float(sum((Fraction(value) * Fraction(weight) for value, weight in pairs), Fraction()) / total_weight)


def first(values: Sequence[Any]) -> Any:
    return values[0]


def last(values: Sequence[Any]) -> Any:
    return values[-1]


def _numbers(values: Sequence[Any]) -> Sequence[Any]:
    """The numbers to reduce; empty when some value is neither a number nor None."""
    if all(isinstance(value, int | float) or value is None for value in values):
        return [value for value in values if value is not None]
    return ()


_OPS: Final[dict[str, Reducer]] = {
    "mean": mean,
    "sum": total,
    "sum53": fingerprint,
    "min": smallest,
    "max": largest,
    "first": first,
    "last": last,
}
NAMES: Final = (*_OPS, PER_RANK, SPREAD, "p0 to p100", f"{WEIGHTED}<key>")
"""For people."""
