"""Filters and order of a list of runs: W&B's subset of MongoDB's query language.

`{"$and": [...]}`, `$or`, `$nor`, `$not`; per field `$eq $ne $gt $gte $lt $lte $in $nin $regex $exists`, a bare value
meaning `$eq`. A field that a run lacks matches only `$ne`, `$nin`, `{"$exists": false}` and null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any, TypeAlias

from wbdist.protocol import jsonvalues
from wbdist.server.store.interface import RunRow

Predicate: TypeAlias = Callable[[RunRow], bool]
_Test: TypeAlias = Callable[[Any], bool]

_MISSING = object()
_MAX_DEPTH = 20
_MAX_SUBJECT = 256

_FIELDS: dict[str, Callable[[RunRow], Any]] = {
    "state": lambda run: run.state.value,
    "name": lambda run: run.run_id,
    "display_name": lambda run: run.display_name,
    "tags": lambda run: run.tags,
    "group": lambda run: run.group,
    "job_type": lambda run: run.job_type,
    "notes": lambda run: run.notes,
    "host": lambda run: run.host,
    "commit": lambda run: run.commit,
    "sweep": lambda run: run.sweep or None,
    "created_at": lambda run: run.created_at,
    "heartbeat_at": lambda run: run.heartbeat_at,
    "duration": lambda run: max(0.0, run.heartbeat_at - run.created_at),
    "attempt": lambda run: run.attempt,
}
_ALIASES = {"displayName": "display_name", "jobType": "job_type", "createdAt": "created_at", "heartbeatAt": "heartbeat_at"}
_TIMES = frozenset({"created_at", "heartbeat_at"})


def compile_filter(text: str | None) -> Predicate:
    """The predicate for a `filters` argument; None or {} lets every run pass. Raises ValueError naming what is wrong."""
    if not text:
        return lambda _run: True
    return _compile(jsonvalues.loads_object(text, "filters"), 0)


def _compile(query: Any, depth: int) -> Predicate:
    if not isinstance(query, dict):
        raise ValueError(f"a filter must be an object, not {query!r:.80}")
    if depth > _MAX_DEPTH:
        raise ValueError(f"filters are nested deeper than {_MAX_DEPTH}")
    parts = [_clause(key, value, depth) for key, value in query.items()]
    return lambda run: all(part(run) for part in parts)


def _clause(key: str, value: Any, depth: int) -> Predicate:
    if key in {"$and", "$or", "$nor"}:
        if not isinstance(value, list):
            raise ValueError(f"{key} takes a list of filters")
        parts = [_compile(item, depth + 1) for item in value]
        if key == "$and":
            return lambda run: all(part(run) for part in parts)
        if key == "$or":
            # An empty $or, which W&B's own page sends for "no filter", lets everything pass.
            return lambda run: not parts or any(part(run) for part in parts)
        return lambda run: not any(part(run) for part in parts)
    if key == "$not":
        inner = _compile(value, depth + 1)
        return lambda run: not inner(run)
    if key.startswith("$"):
        raise ValueError(f"operator {key} is not known here; use $and, $or, $nor, $not around filters")
    getter = _getter(key)
    test = _field_test(value, _ALIASES.get(key, key) in _TIMES, depth)
    return lambda run: test(getter(run))


def _field_test(value: Any, is_time: bool, depth: int) -> _Test:
    if not isinstance(value, dict) or not any(key.startswith("$") for key in value):
        return _operator("$eq", value, is_time, depth)
    tests = [_operator(name, operand, is_time, depth) for name, operand in value.items()]
    return lambda found: all(test(found) for test in tests)


def _operator(name: str, operand: Any, is_time: bool, depth: int) -> _Test:
    if name == "$not":
        if depth > _MAX_DEPTH:
            raise ValueError(f"filters are nested deeper than {_MAX_DEPTH}")
        inner = _field_test(operand, is_time, depth + 1)
        return lambda found: not inner(found)
    if name == "$exists":
        return lambda found: (found is not _MISSING) == bool(operand)
    if name == "$regex":
        return _regex(operand)
    if name in {"$in", "$nin"}:
        if not isinstance(operand, list):
            raise ValueError(f"{name} takes a list, not {operand!r:.80}")
        wanted = [_time(item) if is_time else item for item in operand]
        within: _Test = lambda found: any(_equal(found, item) for item in wanted)  # noqa: E731
        return within if name == "$in" else lambda found: not within(found)
    value = _time(operand) if is_time else operand
    if name == "$eq":
        return lambda found: _equal(found, value)
    if name == "$ne":
        return lambda found: not _equal(found, value)
    compare = _COMPARISONS.get(name)
    if compare is None:
        raise ValueError(f"operator {name} is not known here; use $eq $ne $gt $gte $lt $lte $in $nin $regex $exists $not")
    return lambda found: _comparable(found, value) and compare(found, value)


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": lambda a, b: bool(a > b),
    "$gte": lambda a, b: bool(a >= b),
    "$lt": lambda a, b: bool(a < b),
    "$lte": lambda a, b: bool(a <= b),
}


def _equal(found: Any, value: Any) -> bool:
    """MongoDB's rule: a list also equals its members; null equals what is missing. 1 and True differ, 1 and 1.0 do not."""
    if found is _MISSING or found is None:
        return value is None
    if isinstance(found, list) and not isinstance(value, list):
        return any(_equal(item, value) for item in found)
    if isinstance(found, bool) or isinstance(value, bool):
        return found is value
    return bool(found == value)


def _comparable(found: Any, value: Any) -> bool:
    if isinstance(found, str) or isinstance(value, str):
        return isinstance(found, str) and isinstance(value, str)
    return all(isinstance(item, int | float) and not isinstance(item, bool) for item in (found, value))


def _time(value: Any) -> Any:
    """Unix seconds of an ISO 8601 text; UTC when it names no zone."""
    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"{value[:40]!r} is not a time; use ISO 8601, like 2026-11-21T05:00:00Z") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _regex(pattern: Any) -> _Test:
    if not isinstance(pattern, str) or len(pattern) > 200:
        raise ValueError("$regex takes a pattern of at most 200 characters")
    try:
        _refuse_explosive(_parser.parse(pattern), 0, [])
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"$regex {pattern!r} is not a pattern: {error}") from error

    def test(found: Any) -> bool:
        if isinstance(found, list):
            return any(test(item) for item in found)
        return isinstance(found, str) and expression.search(found[:_MAX_SUBJECT]) is not None

    return test


_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT}


def _refuse_explosive(items: Any, depth: int, seen: list[int]) -> None:
    """Python's matcher backtracks and holds the interpreter's lock, so one `(a+)+$` would stop the whole server.

    A repetition or alternatives inside a repetition are refused, and more than three repetitions in all: what is left
    takes milliseconds at most on 256 characters.
    """
    for operation, argument in items:
        if operation in _REPEATS:
            low, high, inner = argument
            if high > 1 and high != low:
                seen.append(1)
                if depth or len(seen) > 3:
                    raise ValueError("$regex: at most three repetitions, and none inside another, are allowed")
            _refuse_explosive(inner, depth + (high > 1), seen)
        elif operation is _constants.SUBPATTERN:
            _refuse_explosive(argument[3], depth, seen)
        elif operation is _constants.BRANCH:
            if depth:
                raise ValueError("$regex: alternatives inside a repetition are not allowed; use [ab] for single characters")
            for branch in argument[1]:
                _refuse_explosive(branch, depth, seen)
        elif operation in {_constants.ASSERT, _constants.ASSERT_NOT}:
            _refuse_explosive(argument[1], depth, seen)
        elif operation in {_constants.GROUPREF, _constants.GROUPREF_EXISTS, _constants.ATOMIC_GROUP}:
            raise ValueError("$regex: back references, conditions and atomic groups are not allowed")


def _getter(key: str) -> Callable[[RunRow], Any]:
    known = _FIELDS.get(_ALIASES.get(key, key))
    if known is not None:
        return known
    for prefix, source in (("config.", _config), ("summary_metrics.", _summary), ("summaryMetrics.", _summary)):
        if key.startswith(prefix):
            path = key[len(prefix) :]
            return lambda run: source(run, path)
    if key.startswith("keys_info.keys."):
        metric = key[len("keys_info.keys.") :]
        return lambda run: metric if metric in run.metrics else _MISSING
    allowed = ", ".join(sorted([*_FIELDS, "config.<key>", "summary_metrics.<key>", "keys_info.keys.<metric>"]))
    raise ValueError(f"runs have no field {key[:80]!r} to filter or sort by; there are: {allowed}")


def _config(run: RunRow, path: str) -> Any:
    """`lr`, `lr.value`, `optimizer.lr`, `optimizer.value.lr`: W&B writes all of them."""
    values = {key: item["value"] if isinstance(item, dict) and "value" in item else item for key, item in run.config.items()}
    found = _dig(values, path)
    if found is _MISSING and path.endswith(".value"):
        found = _dig(values, path[: -len(".value")])
    if found is _MISSING and ".value." in path:
        found = _dig(values, path.replace(".value.", ".", 1))
    return found


def _summary(run: RunRow, path: str) -> Any:
    return _dig(run.summary, path)


def _dig(value: Any, path: str) -> Any:
    """Keys may hold dots themselves, so the longest key that fits goes first."""
    if not isinstance(value, dict):
        return _MISSING
    if path in value:
        return value[path]
    end = path.rfind(".")
    while end > 0:
        if path[:end] in value:
            found = _dig(value[path[:end]], path[end + 1 :])
            if found is not _MISSING:
                return found
        end = path.rfind(".", 0, end)
    return _MISSING


def ordered(runs: Sequence[RunRow], order: str | None) -> list[RunRow]:
    """`+created_at` (the default), `-summary_metrics.loss`, `config.lr.value`; runs without the value, or with NaN, last.

    Equal runs stand in the order of their creation. Raises ValueError for an unknown field.
    """
    order = order or "+created_at"
    descending = order.startswith("-")
    getter = _getter(order.lstrip("+-"))
    oldest_first = sorted(runs, key=lambda run: (run.created_at, run.pk))
    with_value: list[tuple[tuple[int, Any], RunRow]] = []
    without: list[RunRow] = []
    for run in oldest_first:
        key = _sort_key(getter(run))
        if key is None:
            without.append(run)
        else:
            with_value.append((key, run))
    # A stable sort in both directions: `reverse=True` keeps equal elements in their order.
    with_value.sort(key=lambda pair: pair[0], reverse=descending)
    return [run for _, run in with_value] + without


def _sort_key(value: Any) -> tuple[int, Any] | None:
    if isinstance(value, str):
        return (1, value)
    if isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
        return (0, value)
    return None
