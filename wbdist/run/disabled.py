"""What a disabled run has in place of a journal: it counts steps and keeps the summary, and writes nothing."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from wbdist.core.rows import StepRule
from wbdist.core.summary import SummaryTracker
from wbdist.run.journal import Kind


class NoJournal:
    """The part of `JournalWriter` that a run uses, of a journal that keeps nothing."""

    path: None = None

    def __init__(self, starting_step: int, summary: Mapping[str, Any]) -> None:
        self.lock = threading.RLock()
        self.rule = StepRule(starting_step)
        self._summary = SummaryTracker(summary)

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> bool:
        """Takes any values: a script that is tried without tracking must not fail on them."""
        with self.lock:
            if self.rule.accept(step, commit) is None:
                return False
            self._summary.add_row(data)
            return True

    def commit_row(self) -> None:
        with self.lock:
            self.rule.close()

    def summary(self) -> dict[str, Any]:
        with self.lock:
            return dict(self._summary.values)

    def append(self, kind: Kind, payload: Mapping[str, Any], time: float | None = None) -> int:
        del time
        with self.lock:
            if kind is Kind.SUMMARY:
                self._summary.change(payload.get("set", {}), payload.get("delete", ()))
            elif kind is Kind.DEFINE and "name" in payload:
                self._summary.define(payload)
        return -1

    def sync(self) -> int:
        return -1

    def close(self, exit_code: int | None, cause: str = "exit") -> None:
        """Nothing to end."""
