"""The summary of a run: the last value of every key, and what was set by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wbdist.core.rows import merge

_SPECIAL = frozenset({dict, type(None)})


class SummaryTracker:
    """Follows rows and manual changes; `values` is the summary so far, `_step`, `_timestamp` and `_runtime` included."""

    def __init__(self, base: Mapping[str, Any] | None = None) -> None:
        """`base`: the summary this attempt builds upon."""
        self.values: dict[str, Any] = dict(base or {})
        self.version = 0
        """Grows with every change."""

    def add_row(self, row: Mapping[str, Any]) -> None:
        """A finished row: every key takes its new value; None leaves the summary as it is (as in W&B)."""
        if _SPECIAL.isdisjoint(map(type, row.values())):
            self.values.update(row)
        else:
            merge(self.values, without_none(row))
        self.version += 1

    def change(self, values: Mapping[str, Any], deleted: Iterable[str] = ()) -> None:
        """A change made by hand: replaces whole values, and removes keys."""
        self.values.update(values)
        for key in deleted:
            self.values.pop(key, None)
        self.version += 1


def without_none(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: without_none(value) if isinstance(value, dict) else value for key, value in row.items() if value is not None}
