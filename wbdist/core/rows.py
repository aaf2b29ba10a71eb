"""W&B's step rule: how `log` calls become history rows.

One row is open at a time, for the current step. A call for the current step merges into it, a call for a later step
closes it first, a call for an earlier step is dropped whole. `commit` closes the row behind the call. Without `step`, a
call is for the current step and commits unless told otherwise; with `step`, it commits only when told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wbdist.core.metrics import StepMetrics


class StepRule:
    """The rule as arithmetic, without the data: for the client, which must answer `log` at once and cheaply."""

    __slots__ = ("last_step", "open", "rows", "step")

    def __init__(self, starting_step: int = 0) -> None:
        self.step = starting_step
        """The current step: of the open row, or of the next one."""
        self.open = False
        """Whether a row is open."""
        self.rows = 0
        """Rows closed so far: the seq of the next one, and this writer's history count in a watermark."""
        self.last_step = starting_step - 1
        """Step of the last closed row, one below the starting step when there is none: a watermark's `step`."""

    def copy(self) -> StepRule:
        made = StepRule(self.step)
        made.open, made.rows, made.last_step = self.open, self.rows, self.last_step
        return made

    def accept(self, step: int | None, commit: bool | None) -> tuple[int, bool] | None:
        """The call's (step, commit) with nothing left open, or None when the call must be dropped (step < current)."""
        if step is None:
            step = self.step
            if commit is None:
                commit = True
        elif step < self.step:
            return None
        elif step > self.step:
            if self.open:
                self.rows += 1
                self.last_step = self.step
            self.step = step
        if commit:
            self.rows += 1
            self.last_step = step
            self.step = step + 1
            self.open = False
        else:
            self.open = True
        return step, bool(commit)

    def close(self) -> bool:
        """Closes the open row; False when there is none."""
        if not self.open:
            return False
        self.open = False
        self.rows += 1
        self.last_step = self.step
        self.step += 1
        return True


class RowAssembler:
    """Journal records in, finished history rows out, in seq order. The same records give the same rows, always."""

    def __init__(
        self, *, starting_step: int = 0, created: float = 0.0, runtime: float = 0.0, summary: Mapping[str, Any] | None = None
    ) -> None:
        """`created`: when `_runtime` began to count; `runtime`: what it had reached before; `summary`: the one at the base,
        which knows the last values of step metrics."""
        self._rule = StepRule(starting_step)
        self._began = created - runtime
        self._row: dict[str, Any] = {}
        self._time = created
        self._step_metrics = StepMetrics(summary)
        self._defined = False
        self.dropped = 0
        """Calls dropped because their step was already closed."""

    @property
    def rows(self) -> int:
        """Rows finished so far: the seq of the next one."""
        return self._rule.rows

    @property
    def open(self) -> bool:
        """Whether a row is open."""
        return self._rule.open

    def add(self, data: Mapping[str, Any], step: int | None, commit: bool | None, time: float) -> list[dict[str, Any]]:
        """One `log` call; the rows it finished: none, one, or two (the open one and its own)."""
        rule = self._rule
        before, was_open = rule.step, rule.open
        accepted = rule.accept(step, commit)
        if accepted is None:
            self.dropped += 1
            return []
        finished = []
        if was_open and accepted[0] > before:
            finished.append(self._finish(before))
        self._time = time
        if self._row:
            merge(self._row, data)
        else:
            self._row = dict(data)
        if accepted[1]:
            finished.append(self._finish(accepted[0]))
        return finished

    def define(self, given: Mapping[str, Any]) -> None:
        """A `define_metric` call: rows that are finished after it get the step metrics it asks for."""
        self._step_metrics.define(given)
        self._defined = True

    def close(self) -> list[dict[str, Any]]:
        """Closes the open row, if there is one (an explicit end of the row, the end of the run, the death of the writer)."""
        step = self._rule.step
        return [self._finish(step)] if self._rule.close() else []

    def _finish(self, step: int) -> dict[str, Any]:
        row = self._row
        self._row = {}
        if self._defined:
            self._step_metrics.complete(row)
        row["_step"] = step
        row["_timestamp"] = self._time
        row["_runtime"] = self._time - self._began
        return row


def merge(row: dict[str, Any], data: Mapping[str, Any]) -> None:
    """Lays `data` over `row`, key by key also inside nested dicts; a media value (a dict with `_type`) is one value."""
    for key, value in data.items():
        known = row.get(key)
        if isinstance(value, dict) and isinstance(known, dict) and "_type" not in value and "_type" not in known:
            known = dict(known)
            merge(known, value)
            row[key] = known
        else:
            row[key] = value
