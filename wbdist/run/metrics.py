"""`define_metric`: its arguments checked, and the summary of a run that uses it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from wbdist.core.metrics import OPERATIONS, unescaped
from wbdist.errors import UsageError
from wbdist.run.journal import JournalReader

if TYPE_CHECKING:
    from wbdist.run.shipper.lines import Translator


class Metric(msgspec.Struct, frozen=True):
    """What `define_metric` returns: the call's arguments as they were understood; None where none was given."""

    name: str
    step_metric: str | None = None
    step_sync: bool | None = None
    hidden: bool | None = None
    summary: tuple[str, ...] | None = None
    goal: str | None = None
    overwrite: bool = False

    def arguments(self) -> dict[str, Any]:
        """Those that were given: the payload of a DEFINE record."""
        given = msgspec.to_builtins(self)
        return {name: value for name, value in given.items() if value is not None and (name != "overwrite" or value)}


def metric(  # noqa: PLR0917  (W&B's order)
    name: str,
    step_metric: str | Metric | None = None,
    step_sync: bool | None = None,
    hidden: bool | None = None,
    summary: str | Iterable[str] | None = None,
    goal: str | None = None,
    overwrite: bool | None = None,
) -> Metric:
    """Raises UsageError for what `Run.define_metric` refuses."""
    key = _key(name, "name")
    step_key = None
    if step_metric is not None:
        step_key = _key(step_metric.name if isinstance(step_metric, Metric) else step_metric, "step_metric")
        if step_key.endswith("*"):
            raise UsageError(f"define_metric(step_metric={step_metric!r}): an x axis is one metric, not all that begin alike")
    return Metric(
        name=key,
        step_metric=step_key,
        step_sync=step_sync if step_sync is not None or step_key is None else True,
        hidden=hidden,
        summary=_operations(summary),
        goal=_goal(goal),
        overwrite=bool(overwrite),
    )


def _key(name: object, argument: str) -> str:
    if not isinstance(name, str) or not name:
        raise UsageError(f"define_metric({argument}={name!r}): give the key of a metric, a non-empty string")
    if "*" in name[:-1]:
        raise UsageError(f"define_metric({argument}={name!r}): `*` may stand at the end only, as in 'val/*'")
    return unescaped(name)


def _operations(summary: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if summary is None:
        return None
    words = summary.split(",") if isinstance(summary, str) else list(summary)
    asked = tuple(dict.fromkeys(str(word).strip() for word in words))
    if unknown := [word for word in asked if word not in OPERATIONS]:
        raise UsageError(f"define_metric(summary={summary!r}): {unknown[0]!r} is not known; choose of: {', '.join(OPERATIONS)}")
    return asked


def _goal(goal: str | None) -> str | None:
    if goal is None:
        return None
    short = str(goal)[:3].lower()
    if short not in {"min", "max"}:
        raise UsageError(f"define_metric(goal={goal!r}): choose 'minimize' or 'maximize'")
    return short


class JournaledSummary:
    """The summary as the server gets it, read back from the run's own journal when somebody asks: so that `log` pays nothing
    for metrics that are defined. Rows that are still open are not in it. Thread-safe."""

    def __init__(self, journal: Path) -> None:
        self.lock = threading.Lock()
        self._journal = journal
        self._reader: JournalReader | None = None
        self._translator: Translator | None = None

    def state(self) -> dict[str, Any]:
        """With what a later attempt needs beside the values (`SummaryTracker.state`)."""
        with self.lock:
            if self._translator is None:
                self._open()
            assert self._translator is not None
            if self._reader is not None:
                while records := self._reader.read():
                    self._translator.feed(records)
                if self._reader.ended is not None:
                    self._release()
            return self._translator.summary()

    def close(self) -> None:
        """Gives the file up until somebody asks again."""
        with self.lock:
            if self._reader is not None:
                self._release()
                self._translator = None

    def _open(self) -> None:
        from wbdist.run.shipper.lines import Translator

        self._reader = JournalReader.open(self._journal)
        self._translator = Translator(self._reader.header)
        self._translator.skip = dict.fromkeys(self._translator.produced, 1 << 62)  # lines are the shipper's

    def _release(self) -> None:
        assert self._reader is not None
        self._reader.close()
        self._reader = None
