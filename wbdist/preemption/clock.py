"""The end that is known beforehand: a wall-clock limit, a scheduler's end time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

from wbdist.errors import UsageError
from wbdist.preemption.notice import Notice

LOOK = 5.0
"""Seconds between two looks at the clock, which may be set, and at how early the notice has to come, which may change."""
SHARE = 0.25
"""Of the time that there was at the start, the most that the lead may take: a short job shall train for most of it."""


class EndSource:
    """Gives a notice `lead()` seconds before the time that `end()` says, in short jobs less."""

    def __init__(self, name: str, end: Callable[[], float | None], lead: Callable[[], float], reason: str) -> None:
        """`end`: unix time, None when it is not known; asked again just before the notice, since it may have been extended."""
        self._name, self._end, self._lead, self._reason = name, end, lead, reason
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, tell: Callable[[Notice], bool]) -> None:
        """Any thread. Raises UsageError when the source was started before."""
        if self._thread is not None:
            raise UsageError("this EndSource was started before; make another")
        self._thread = threading.Thread(target=self._watch, args=(tell,), name=f"wbdist-{self._name}", daemon=True)
        self._thread.start()

    def _watch(self, tell: Callable[[Notice], bool]) -> None:
        end = self._end()
        most = 0.0 if end is None else SHARE * max(0.0, end - time.time())
        while end is not None and not self._closing.is_set():
            lead = min(self._lead(), most)
            left = end - time.time() - lead
            if left <= 0:
                end = self._end()
                if end is not None and end - time.time() <= lead:
                    tell(Notice(self._name, f"{self._reason} in {max(0.0, end - time.time()):.0f} s", time.monotonic(), end))
                    return
            else:
                self._closing.wait(min(left, LOOK))

    def close(self) -> None:
        """Any thread. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(1.0)


def seconds(text: str) -> float:
    """`90`, `90s`, `1.5m`, `1h30m` as seconds. Raises UsageError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        raise UsageError(f"{text!r} is no length of time; give seconds, or numbers with s, m, h or d: 1h30m")
    return sum(float(number) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for number, unit in parts)
