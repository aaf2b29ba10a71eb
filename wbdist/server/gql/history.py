"""Reading a run's history: pages, samples, keys; its system metrics; its console."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from wbdist.core.position import CONSOLE, EVENTS, HISTORY
from wbdist.protocol import jsonvalues
from wbdist.server import console_file
from wbdist.server.context import AppContext
from wbdist.server.gql.call import Info, Resolver, call_of, refuse
from wbdist.server.gql.session import page, page_info
from wbdist.server.store.interface import RunRow

_DEFAULT_SAMPLES = 500
_MAX_SAMPLES = 10_000
_READ_WHOLE = 20_000
"""Up to so many rows a sample is taken from all of them; above, from evenly spaced steps."""
_KEY_BUCKETS = 200


class SampleSpec(msgspec.Struct, frozen=True, rename="camel"):
    """One `specs` entry. With minStep or maxStep (both inclusive) every row between them, else at most `samples`."""

    keys: list[str] = []
    samples: int = _DEFAULT_SAMPLES
    min_step: int | None = None
    max_step: int | None = None


def _history(
    run: RunRow,
    info: Info,
    *,
    minStep: int | None = None,  # noqa: N803
    maxStep: int | None = None,  # noqa: N803
    samples: int | None = None,
    attempt: int | None = None,
) -> list[str]:
    ctx = call_of(info).app
    if minStep is None and maxStep is None and attempt is None:
        rows = _sample(ctx, run, _checked_samples(samples), None)
    else:
        rows = _between(ctx, run, minStep or 0, maxStep, attempt=attempt)
    return [jsonvalues.dumps(row) for row in rows]


def _events(run: RunRow, info: Info, samples: int | None = None) -> list[str]:
    rows = call_of(info).app.store.history(run.pk, stream=EVENTS, attempt=run.view)
    return [jsonvalues.dumps(row) for row in _evenly(rows, _checked_samples(samples))]


def _sampled_history(run: RunRow, info: Info, specs: list[str]) -> list[list[dict[str, Any]]]:
    ctx = call_of(info).app
    answer = []
    for text in specs:
        try:
            spec = msgspec.convert(jsonvalues.loads_object(text, "a spec"), SampleSpec)
        except (ValueError, msgspec.ValidationError) as error:
            raise refuse(400, f"specs: {error}") from None
        keys = spec.keys or None
        if spec.min_step is None and spec.max_step is None:
            rows = _sample(ctx, run, _checked_samples(spec.samples), keys)
        else:
            stop = None if spec.max_step is None else spec.max_step + 1
            rows = _between(ctx, run, spec.min_step or 0, stop, keys=keys)
        answer.append(rows)
    return answer


def _parquet_history(run: RunRow, info: Info, liveKeys: list[str] | None = None) -> dict[str, Any]:  # noqa: N803
    """No parquet files: every row is live, and the client pages through them."""
    ctx = call_of(info).app
    rows = _read(ctx, run, liveKeys or None)
    return {"parquetUrls": [], "liveData": rows}


def _checked_samples(samples: int | None) -> int:
    if samples is None:
        return _DEFAULT_SAMPLES
    if samples < 1:
        raise refuse(400, f"samples must be at least 1, not {samples}")
    return min(samples, _MAX_SAMPLES)


def _between(
    ctx: AppContext, run: RunRow, start: int, stop: int | None, *, keys: Sequence[str] | None = None, attempt: int | None = None
) -> list[dict[str, Any]]:
    """Complete, never sampled: a caller that gives a range adds the pages up."""
    most = ctx.settings.max_rows
    rows = _read(ctx, run, keys, min_step=start, max_step=stop, limit=most + 1, attempt=attempt)
    if len(rows) > most:
        raise refuse(400, f"more than {most} rows lie between these steps; ask for fewer at a time")
    return rows


def _sample(ctx: AppContext, run: RunRow, samples: int, keys: Sequence[str] | None) -> list[dict[str, Any]]:
    """At most `samples` rows over the whole history, the first and the last among them."""
    if run.line_counts.get(HISTORY, 0) <= _READ_WHOLE:
        return _evenly(_read(ctx, run, keys), samples)
    found: dict[int, dict[str, Any]] = {}
    for index in range(samples):
        step = index * run.last_step // max(1, samples - 1)
        for row in _read(ctx, run, None if keys is None else ["_step", *keys], min_step=step, limit=1):
            found[row["_step"]] = row if keys is None else {key: row[key] for key in keys}
    return [found[step] for step in sorted(found)]


def _evenly(rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    if len(rows) <= samples:
        return rows
    if samples == 1:
        return rows[-1:]
    return [rows[index * (len(rows) - 1) // (samples - 1)] for index in range(samples)]


def _read(ctx: AppContext, run: RunRow, keys: Sequence[str] | None, **where: Any) -> list[dict[str, Any]]:
    """Rows that have all `keys`, with these alone; `a.b` is a key of its own or the member `b` of a nested `a`."""
    if where.get("attempt") is None:
        where["attempt"] = run.view
    rows = ctx.store.history(run.pk, keys=keys, **where)
    if rows or keys is None or not any("." in key for key in keys):
        return rows
    roots = list(dict.fromkeys(key if key in run.metrics else key.partition(".")[0] for key in keys))
    nested = [_members(row, keys) for row in ctx.store.history(run.pk, keys=roots, **where)]
    return [row for row in nested if row is not None]


def _members(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """None when one is missing."""
    found = {}
    for key in keys:
        value: Any = row
        for part in [key] if key in row else key.split("."):
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        found[key] = value
    return found


class KeyCache:
    """historyKeys of runs by (pk, version): each costs a pass over the rollups of every metric, and is asked for often."""

    def __init__(self, size: int = 500) -> None:
        self._size = size
        self._entries: OrderedDict[tuple[int, int | None, int], dict[str, Any] | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ctx: AppContext, run: RunRow) -> dict[str, Any] | None:
        """None when nothing was logged."""
        key = (run.pk, run.view, run.version)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        found = _describe_keys(ctx, run)
        with self._lock:
            self._entries[key] = found
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return found


def _describe_keys(ctx: AppContext, run: RunRow) -> dict[str, Any] | None:
    """Numeric metrics from the rollups; keys of other types as far as the last row has them."""
    tail = ctx.store.history_tail(run.pk, HISTORY, attempt=run.view)
    if tail is None:
        return None
    keys: dict[str, Any] = {}
    names = list(dict.fromkeys((*run.metrics, "_step", "_timestamp", "_runtime")))
    for name, buckets in ctx.store.many_series(run.pk, names, buckets=_KEY_BUCKETS, attempt=run.view).items():
        keys[name] = {
            "typeCounts": [{"type": "number", "count": sum(bucket.count for bucket in buckets)}],
            "monotonic": all(before.max <= after.min for before, after in pairwise(buckets)),
            "previousValue": buckets[-1].last,
        }
    for name, value in _flat(tail):
        if name not in keys:
            keys[name] = {"typeCounts": [{"type": _type_name(value), "count": 1}], "monotonic": False, "previousValue": value}
    return {"keys": keys, "lastStep": run.last_step, "sets": []}


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Members of nested objects as `a.b`, which is how W&B names them; a media value (`_type`) is one value."""
    for key, value in row.items():
        if isinstance(value, dict) and "_type" not in value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return {str: "string", list: "list", type(None): "nil"}.get(type(value), "map")


# Console ----------------------------------------------------------------------------------------------


def _log_lines(
    run: RunRow, info: Info, first: int | None = None, after: str | None = None, last: int | None = None, **_options: Any
) -> dict[str, Any]:
    ctx = call_of(info).app
    total = run.line_counts.get(CONSOLE, 0)
    most = 10_000
    if last is not None:
        if last < 0:
            raise refuse(400, f"last must be at least 0, not {last}")
        start, stop = max(0, total - min(last, most)), total
    else:
        start, stop = page(after, first, total, most)
    lines = ctx.store.console(run.pk, first=start, limit=stop - start, attempt=run.view) if stop > start else []
    edges = [{"node": _log_line(start + index, text)} for index, text in enumerate(lines)]
    return {"edges": edges, "pageInfo": page_info(stop, total)}


def _log_line(number: int, text: str) -> dict[str, Any]:
    match = console_file.LINE.fullmatch(text)
    if match is None:
        return {"number": number, "timestamp": None, "level": "", "label": "", "line": text}
    return {
        "number": number,
        "timestamp": match["ts"] + "Z",
        "level": "error" if match["error"] else "",
        "label": match["label"] or "",
        "line": match["text"],
    }


_keys = KeyCache()

RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Run": {
        "history": _history,
        "events": _events,
        "sampledHistory": _sampled_history,
        "parquetHistory": _parquet_history,
        "historyKeys": lambda run, info: _keys.get(call_of(info).app, run),
        "logLines": _log_lines,
    },
}
