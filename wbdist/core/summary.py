"""The summary of a run: the last value of every key, or what `define_metric` asked for, and what was set by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wbdist.core.metrics import Aggregate, Definitions, state_of
from wbdist.core.rows import merge

_SPECIAL = frozenset({dict, type(None)})
INTERNAL = "_wandb"
"""Key of a summary under which `state` keeps what the values do not tell."""


class SummaryTracker:
    """Follows rows, definitions and manual changes; `values` is the summary so far, with `_step`, `_timestamp`, `_runtime`.

    A value set by hand replaces what rows said before; a later row of that key replaces it in turn (as in W&B), and what is
    asked of its values (`min`, ...) is then of those since.
    """

    def __init__(self, base: Mapping[str, Any] | None = None) -> None:
        """`base`: the summary this attempt builds upon, best as `state` gave it."""
        self._base = base or {}
        self._values: dict[str, Any] = {key: value for key, value in self._base.items() if key != INTERNAL}
        self.version = 0
        """Grows with every change."""
        self.definitions = Definitions()
        self._aggregates: dict[str, Aggregate] = {}
        self._unreported: set[str] = set()
        """Keys whose aggregates have values that `_values` does not tell yet: telling costs more than counting."""
        self._anew: set[str] = set()
        """Keys that were set by hand: what the base said of them is over."""
        self._steps: dict[str, Any] = dict(state_of(self._base, "steps"))
        """Last values of step metrics."""

    @property
    def values(self) -> dict[str, Any]:
        if self._unreported:
            for key in sorted(self._unreported):
                self._report(key, self._aggregates[key])
            self._unreported.clear()
        return self._values

    def define(self, given: Mapping[str, Any]) -> None:
        """A `define_metric` call (`Definitions.define`); holds for what comes after it."""
        values = self.values
        self.definitions.define(given)
        for key in list(values):
            if self._is_hidden(key):
                del values[key]
        self._unreported.update(self._aggregates)
        self.version += 1

    def add_row(self, row: Mapping[str, Any]) -> None:
        """A finished row: every key takes its new value; None leaves the summary as it is (as in W&B)."""
        if self.definitions:
            row = self._aggregated(row)
        if _SPECIAL.isdisjoint(map(type, row.values())):
            self._values.update(row)
        else:
            merge(self._values, without_none(row))
        self.version += 1

    def change(self, values: Mapping[str, Any], deleted: Iterable[str] = ()) -> None:
        """A change made by hand: replaces whole values, and removes keys."""
        deleted = tuple(deleted)
        self._values.update(values)
        for key in deleted:
            self._values.pop(key, None)
        for key in (*values, *deleted):
            self._aggregates.pop(key, None)
            self._unreported.discard(key)
            self._anew.add(key)
        self.version += 1

    def state(self) -> dict[str, Any]:
        """`values`, and under INTERNAL what a later attempt needs beside them to go on exactly; for it, and for the server."""
        sums = {
            key: [aggregate.count, aggregate.total]
            for key, aggregate in self._aggregates.items()
            if (found := self.definitions.of(key)) is not None and "mean" in found.summary
        }
        asleep = state_of(self._base, "sums").items()
        sums |= {key: value for key, value in asleep if key not in self._aggregates and key not in self._anew}
        steps = {key: value for key, value in self._steps.items() if self.values.get(key) != value}
        internal = {name: kept for name, kept in (("sums", sums), ("steps", steps)) if kept}
        return {**self.values, INTERNAL: internal} if internal else dict(self.values)

    def _aggregated(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row without the keys that have more than a last value."""
        rest: dict[str, Any] = {}
        of, steps = self.definitions.of, self.definitions.step_metrics
        for key, value in row.items():
            found = of(key)
            if key in steps and value is not None:
                self._steps[key] = value
            if found is None or found.plain:
                rest[key] = value
            elif "none" not in found.summary:
                aggregate = self._aggregates.get(key)
                if aggregate is None:
                    base = {} if key in self._anew else self._base
                    aggregate = Aggregate.continued(base.get(key), found, state_of(base, "sums").get(key))
                    self._aggregates[key] = aggregate
                aggregate.add(value)
                self._unreported.add(key)
        return rest

    def _report(self, key: str, aggregate: Aggregate) -> None:
        found = self.definitions.of(key)
        if found is not None and not found.plain and "none" not in found.summary and (report := aggregate.report(found)):
            self._values[key] = report

    def _is_hidden(self, key: str) -> bool:
        found = self.definitions.of(key)
        return found is not None and "none" in found.summary


def without_none(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: without_none(value) if isinstance(value, dict) else value for key, value in row.items() if value is not None}
