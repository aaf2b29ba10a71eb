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
        steps = [step for row in rows if (step := step_of(row)) >= 0] or [-1]
        numeric = {key: column.numeric() for key, column in split.items()}
        return cls(
            rows,
            cols.pack_all(split),
            json.dumps(numeric),
            len(split),
            visible_keys(numeric),
            min(steps),
            max(steps),
        )


def visible_keys(numeric: dict[str, bool]) -> frozenset[str]:
    """The metrics among them: numeric, and not internal."""
    return frozenset(key for key, is_numeric in numeric.items() if is_numeric and not key.startswith("_"))


def parse(stream: str, lines: Sequence[str]) -> list[Any]:
    """JSON objects of a history or events stream, texts of the console. Raises ValueError naming the line."""
    if stream == CONSOLE:
        return list(lines)
    out = []
    for number, line in enumerate(lines):
        # Not orjson: it turns integers beyond 64 bits into floats, silently.
        row = jsonvalues.loads_object(line, f"line {number} of {stream}")
        if line.count("[") + line.count("{") > _DEEPEST and _depth(row) > _DEEPEST:
            raise ValueError(f"line {number} of {stream} is nested deeper than {_DEEPEST} levels")
        out.append(row)
    return out


def _depth(value: Any) -> int:
    """Level by level, without recursion: the value may be nested as deep as its sender liked."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def step_of(row: dict[str, Any]) -> int:
    """The row's `_step`; -1 when it has none that a step can be."""
    step = row.get("_step", -1)
    if type(step) is int:
        return step if 0 <= step < 2**62 else -1
    return int(step) if type(step) is float and 0 <= step < 2**62 else -1
