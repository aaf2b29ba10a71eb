"""Lines of one request, from JSON text to a chunk ready to be stored; no database here, so no other writer waits for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from wbdist.core.position import CONSOLE
from wbdist.protocol import jsonvalues
from wbdist.server.store import columns as cols

_DEEPEST = 200
"""Levels of nesting: far below the interpreter's own limit, at which a value could be read but not written again."""
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Batch(msgspec.Struct, frozen=True):
    """Consecutive lines as they are stored."""

    rows: list[dict[str, Any]]
    blob: bytes
    keys: str
    """JSON: {key: holds a number?}."""
    width: int
    """How many keys."""
    numeric: frozenset[str]
    """Keys that hold a number, without those that start with '_'."""
    step_lo: int
    step_hi: int
    """Smallest and largest step; -1 when no row has one."""

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> Batch:
        split = cols.split(rows)
        steps = cols.steps_of(split, len(rows))
        having = steps[steps >= 0]
        numeric = {key: column.numeric() for key, column in split.items()}
        return cls(
            rows,
            cols.pack_all(split),
            json.dumps(numeric),
            len(split),
            visible_keys(numeric),
            int(having.min()) if len(having) else -1,
            int(steps.max()),
        )


def visible_keys(numeric: dict[str, bool]) -> frozenset[str]:
    """The metrics among them: numeric, and not internal."""
    return frozenset(key for key, is_numeric in numeric.items() if is_numeric and not key.startswith("_"))


def parse(stream: str, lines: Sequence[str]) -> list[Any]:
    """JSON objects of a history or events stream, texts of the console. Raises ValueError naming the line."""
    if stream == CONSOLE:
        return list(lines)
    try:
        # Not orjson: it turns integers beyond 64 bits into floats, silently.
        out = [_decode(line) for line in lines]
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        # Some line has a NaN, or is no object: one by one, to take the first and to name the other.
        out = [jsonvalues.loads_object(line, f"line {number} of {stream}") for number, line in enumerate(lines)]
    for number, line in enumerate(lines):
        # Such depth takes as many brackets, opened and closed.
        if len(line) > 2 * _DEEPEST and line.count("[") + line.count("{") > _DEEPEST and _depth(out[number]) > _DEEPEST:
            raise ValueError(f"line {number} of {stream} is nested deeper than {_DEEPEST} levels")
    return out


def _depth(value: Any) -> int:
    """Level by level, without recursion: the value may be nested as deep as its sender liked."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
