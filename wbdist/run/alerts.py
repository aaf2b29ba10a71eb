"""`Run.alert`: something that a person should see, on the terminal, among the run's printed lines and on its page."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from wbdist.errors import UsageError
from wbdist.run.journal_format import Kind

if TYPE_CHECKING:
    from wbdist.run.disabled import NoJournal
    from wbdist.run.journal import JournalWriter

WAIT = 60.0
"""Seconds in which one title is not said again, unless told otherwise."""


class AlertLevel(enum.Enum):
    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


class Alerts:
    """Of one run."""

    def __init__(self, journal: JournalWriter | NoJournal, say: Callable[[str], None]) -> None:
        """`say`: to the terminal and the run's output."""
        self._journal = journal
        self._say = say
        self._last: dict[str, float] = {}
        self.count = 0
        """Alerts in the journal."""

    def alert(
        self,
        title: str,
        text: str,
        level: str | AlertLevel | None,
        wait_duration: float | timedelta | None,
        now: float | None = None,
    ) -> bool:
        """Whether it was said; not when one of this title was within `wait_duration` seconds. Raises UsageError."""
        if not title:
            raise UsageError(f"alert(title={title!r}): give a short text")
        word = level.value if isinstance(level, AlertLevel) else "INFO" if level is None else level
        if word not in AlertLevel.__members__:
            raise UsageError(f"alert(level={level!r}): choose of {', '.join(AlertLevel.__members__)}")
        if isinstance(wait_duration, timedelta):
            wait = wait_duration.total_seconds()
        else:
            wait = WAIT if wait_duration is None else float(wait_duration)
        moment = time.monotonic() if now is None else now
        with self._journal.lock:
            if title in self._last and moment < self._last[title] + wait:
                return False
            step = self._journal.rule.step
            facts = {"title": str(title), "text": str(text), "level": word, "wait": wait, "_step": step}
            self._journal.append(Kind.ALERT, facts)
            self._last[title] = moment
            self.count += 1
        self._say(f"ALERT {word} {title}: {text}")
        return True
