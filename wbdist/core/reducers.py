"""Many ranks' values of one step, made one: exact, and the same whatever order they arrived in.

| op         | numbers                       | anything else      | why                                           |
|------------|-------------------------------|--------------------|-----------------------------------------------|
| `mean`     | math.fsum / n, always a float | as `first`         | correctly rounded sum: no order dependence    |
| `sum`      | math.fsum; ints stay ints     | as `first`         |                                               |
| `min, max` | of all; ints stay ints        | as `first`         | NaN wins: Python's min() depends on the order |
| `first`    | the lowest rank's             | the lowest rank's  | for what is alike on all ranks, such as `lr`  |
| `last`     | the highest rank's            | the highest rank's |                                               |
| `sum53`    | ints, modulo 2**53            | as `first`         | fingerprints: exact in a float64, any split   |
| `per_rank` | `<key>/rank<k>` for each      | same               |                                               |

NaN propagates. None counts as not logged, unless no rank logged anything else. A bool is a number (the mean of a flag
is the share of ranks that set it), except to `min` and `max`, which return one of the bools.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

DEFAULT: Final = "mean"
PER_RANK: Final = "per_rank"

_FLOATS: Final = {float}

Ops = Mapping[str, str]
"""key -> op, for the keys whose op is not DEFAULT."""


def reduce_rows(rows: Sequence[tuple[int, Mapping[str, Any], Ops]]) -> dict[str, Any]:
    """One row of all ranks' rows of a step: (rank, data, that rank's ops), at least one, in rank order.

    A key is reduced over the ranks that logged it, by the op that the lowest of them gave. Keys keep the order in which the
    ranks, lowest first, bring them up.
    """
    first = rows[0][1]
    out: dict[str, Any] = {}
    keys = list(first)
    if all(list(row) == keys for _, row, _ in rows):
        # The common case, and the aggregator's hot loop: all ranks ran the same line.
        ops = rows[0][2]
        for key, values in zip(keys, zip(*[row.values() for _, row, _ in rows], strict=True), strict=True):
            op = ops.get(key)
            if op is None:
                out[key] = mean(values)
            elif op == PER_RANK:
                out.update((f"{key}/rank{rank}", value) for (rank, _, _), value in zip(rows, values, strict=True))
            else:
                out[key] = _OPS[op](values)
        return out
    for key in dict.fromkeys(key for _, row, _ in rows for key in row):
        having = [entry for entry in rows if key in entry[1]]
        op = having[0][2].get(key, DEFAULT)
        if op == PER_RANK:
            out.update((f"{key}/rank{rank}", row[key]) for rank, row, _ in having)
        else:
            out[key] = _OPS[op]([row[key] for _, row, _ in having])
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
    exact = sum(map(Fraction, numbers)) / count
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


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


def first(values: Sequence[Any]) -> Any:
    return values[0]


def last(values: Sequence[Any]) -> Any:
    return values[-1]


def _numbers(values: Sequence[Any]) -> Sequence[Any]:
    """The numbers to reduce; empty when some value is neither a number nor None."""
    if all(isinstance(value, int | float) or value is None for value in values):
        return [value for value in values if value is not None]
    return ()


_OPS: Final[dict[str, Callable[[Sequence[Any]], Any]]] = {
    "mean": mean,
    "sum": total,
    "sum53": fingerprint,
    "min": smallest,
    "max": largest,
    "first": first,
    "last": last,
}
NAMES: Final = (*_OPS, PER_RANK)
