"""Defined metrics: which metric is another's x axis, and what the summary keeps of each (W&B's `define_metric`). Pure.

A definition is for one key, or for all keys that begin alike (`val/*`); a key's own definition beats a prefix's, and of several
prefixes the longest wins. Keys that begin with `_` are W&B's own: no prefix means them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import msgspec

OPERATIONS: Final = ("min", "max", "mean", "best", "last", "none", "copy", "first")
"""What a summary can keep of a metric. Here in the order of their numbers in W&B's config, from 1."""
_GOALS: Final = {"min": 1, "max": 2}
_STEP_SYNC, _HIDDEN, _DECLARED = 1, 2, 3
_MISSING: Final = object()


class Definition(msgspec.Struct, frozen=True, dict=True):
    """What is known of a metric, or of all metrics whose keys begin like `name` (which then ends in `*`)."""

    name: str
    step_metric: str = ""
    """Key of the metric that is its x axis; empty: the step."""
    step_sync: bool = False
    """Rows without the step metric get its last value."""
    hidden: bool = False
    """Not to be drawn unasked."""
    summary: tuple[str, ...] = ()
    """Of OPERATIONS; empty: the last value, as it is."""
    goal: str = ""
    """"min" or "max": what "best" is; empty: the smallest."""

    @cached_property
    def plain(self) -> bool:
        """The summary keeps the last value as it is."""
        return not self.summary or set(self.summary) == {"copy"}


class Definitions:
    """The metrics that a run has defined so far."""

    def __init__(self) -> None:
        self._all: dict[str, Definition] = {}
        self._found: dict[str, Definition | None] = {}
        """key -> what holds for it, once it was asked."""
        self.step_metrics: frozenset[str] = frozenset()
        """Keys whose last value is to be known."""
        self.version = 0

    def __bool__(self) -> bool:
        return bool(self._all)

    def define(self, given: Mapping[str, Any]) -> Definition:
        """One `define_metric` call, its arguments by name, absent ones left out: adds to what was said of that name before, or
        replaces it (`overwrite`)."""
        name = given["name"]
        fields = {field: given[field] for field in ("step_metric", "step_sync", "hidden", "goal") if field in given}
        if "summary" in given:
            fields["summary"] = tuple(given["summary"])
        before = None if given.get("overwrite") else self._all.get(name)
        made = Definition(name, **fields) if before is None else msgspec.structs.replace(before, **fields)
        self._all[name] = made
        self._found.clear()
        self.step_metrics = frozenset(each.step_metric for each in self._all.values() if each.step_sync and each.step_metric)
        self.version += 1
        return made

    def of(self, key: str) -> Definition | None:
        """What holds for this key."""
        found = self._found.get(key, _MISSING)
        if found is _MISSING:
            found = self._found[key] = self._look_up(key)
        return found  # type: ignore[return-value]

    def _look_up(self, key: str) -> Definition | None:
        if exact := self._all.get(key):
            return exact
        if key.startswith("_"):
            return None
        matching = [name for name in self._all if name.endswith("*") and key.startswith(name[:-1])]
        return self._all[max(matching, key=len)] if matching else None

    def to_wandb(self) -> list[dict[str, Any]]:
        """The list in W&B's config, `_wandb.m`, ordered as `from_wandb` does. A step metric is named by its place, so each
        has one."""
        listing = dict.fromkeys(self._all)
        listing |= dict.fromkeys(each.step_metric for each in self._all.values() if each.step_metric)
        names = sorted(listing, key=_generality)
        places = {name: place for place, name in enumerate(names, start=1)}
        listed = []
        for name in names:
            found = self._all.get(name)
            entry: dict[str, Any] = {"2" if name.endswith("*") else "1": name.replace(".", "\\.")}
            entry["6"] = []
            entry["7"] = []
            if found is not None:
                if found.step_metric:
                    entry["5"] = places[found.step_metric]
                options = ((_STEP_SYNC, found.step_sync), (_HIDDEN, found.hidden), (_DECLARED, True))
                entry["6"] = [number for number, is_set in options if is_set]
                entry["7"] = sorted(OPERATIONS.index(operation) + 1 for operation in found.summary)
                if found.goal:
                    entry["8"] = _GOALS[found.goal]
            listed.append(entry)
        return listed


def from_wandb(listed: object) -> list[dict[str, Any]]:
    """`define` arguments from W&B's list in a config; entries that are none are passed over (they are another program's).

    A metric's own definition comes before those of its prefixes, so that no value a run goes on from is hidden in between.
    """
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    calls: list[dict[str, Any]] = []
    for entry in entries:
        options = _numbers(entry.get("6"))
        name = entry.get("2") or entry.get("1")
        if not isinstance(name, str) or not (_DECLARED in options or entry.get("5") or entry.get("7") or entry.get("2")):
            continue  # not defined, only somebody's step metric
        call: dict[str, Any] = {"name": unescaped(name)}
        place = entry.get("5")
        if isinstance(place, int) and 1 <= place <= len(entries):
            step_metric = entries[place - 1].get("1")
            if isinstance(step_metric, str):
                call["step_metric"] = unescaped(step_metric)
        if _STEP_SYNC in options:
            call["step_sync"] = True
        if _HIDDEN in options:
            call["hidden"] = True
        if operations := [OPERATIONS[number - 1] for number in _numbers(entry.get("7")) if 1 <= number <= len(OPERATIONS)]:
            call["summary"] = operations
        if goal := next((word for word, number in _GOALS.items() if number == entry.get("8")), ""):
            call["goal"] = goal
        calls.append(call)
    return sorted(calls, key=lambda call: _generality(call["name"]))


def _generality(name: str) -> int:
    """Keys first, then prefixes from the longest."""
    return -len(name) if name.endswith("*") else -(1 << 30)


def unescaped(name: str) -> str:
    """W&B's name of a metric as a key of our rows, where nested and dotted keys are the same: `a\\.b` is `a.b`."""
    return name.replace("\\.", ".")


def _numbers(value: object) -> list[int]:
    return [each for each in value if isinstance(each, int)] if isinstance(value, list) else []


class Aggregate:
    """Everything a summary can say of one metric's values so far. None is no value; NaN, text and media are values that have no
    size: `first` and `last` see them, the others pass them over (in W&B one NaN spoils min, max and mean for good)."""

    __slots__ = ("count", "first", "last", "max", "min", "total")

    def __init__(self) -> None:
        self.first: Any = None
        self.last: Any = None
        self.min: float | None = None
        self.max: float | None = None
        self.count = 0
        self.total = 0.0

    def add(self, value: Any) -> None:
        if value is None:
            return
        self.last = value
        if self.first is None:
            self.first = value
        if type(value) in _NUMBERS and value == value:  # noqa: PLR0124  (NaN)
            self.count += 1
            self.total += float(value)
            if self.min is None or value < self.min:
                self.min = value
            if self.max is None or value > self.max:
                self.max = value

    def report(self, definition: Definition) -> dict[str, Any]:
        """The summary's value; without what no value has said yet."""
        best = self.max if definition.goal == "max" else self.min
        mean = self.total / self.count if self.count else None
        known = {"min": self.min, "max": self.max, "mean": mean, "best": best, "last": self.last, "first": self.first}
        return {operation: known[operation] for operation in definition.summary if known.get(operation) is not None}

    @classmethod
    def continued(cls, report: Any, definition: Definition, sums: Any) -> Aggregate:
        """Goes on from what an earlier attempt reported; `sums`: its (count, total), which a mean does not tell."""
        made = cls()
        if not isinstance(report, Mapping) or "_type" in report:
            return made
        made.first, made.last, made.min, made.max = (report.get(name) for name in ("first", "last", "min", "max"))
        if definition.goal == "max" and made.max is None:
            made.max = report.get("best")
        elif definition.goal != "max" and made.min is None:
            made.min = report.get("best")
        if isinstance(sums, list | tuple) and len(sums) == 2:
            made.count, made.total = int(sums[0]), float(sums[1])
        return made


_NUMBERS: Final = frozenset({int, float})


class StepMetrics:
    """Gives rows the step metric's last value where they lack it."""

    def __init__(self, base: Mapping[str, Any] | None = None) -> None:
        """`base`: the summary that the first row builds upon, as `SummaryTracker.state` gives it."""
        self.definitions = Definitions()
        self._base = base or {}
        self._last: dict[str, Any] = {}

    def define(self, given: Mapping[str, Any]) -> None:
        self.definitions.define(given)
        for key in self.definitions.step_metrics:
            if key not in self._last and (value := last_value(self._base, key)) is not None:
                self._last[key] = value

    def complete(self, row: dict[str, Any]) -> None:
        """Adds the missing step metrics to a finished row."""
        wanted = self.definitions.step_metrics
        if not wanted:
            return
        of, last = self.definitions.of, self._last
        missing = {found.step_metric for key in row if (found := of(key)) is not None and found.step_sync} - row.keys()
        for key in wanted & row.keys():
            last[key] = row[key]
        for key in sorted(missing & last.keys()):
            row[key] = last[key]


def last_value(summary: Mapping[str, Any], key: str) -> Any:
    """The last value of a step metric, as far as the summary still knows it; else None."""
    kept = state_of(summary, "steps")
    value = kept[key] if key in kept else summary.get(key)
    return value.get("last") if isinstance(value, Mapping) else value


def state_of(summary: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """What `SummaryTracker.state` put beside the summary for whoever goes on from it."""
    internal = summary.get("_wandb")
    found = internal.get(what) if isinstance(internal, Mapping) else None
    return found if isinstance(found, Mapping) else {}
