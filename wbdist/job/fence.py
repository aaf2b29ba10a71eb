"""Learning in the middle of training that another job has taken the run over.

The server tells the shipper, whose answer to the next lines is a refusal; the shipper is asked once in a while. What is heard
becomes a notice, so that all ranks stop before the same step; unlike after a preemption, nothing is saved then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from wbdist.preemption.notice import Notice

INTERVAL = 1.0
"""Seconds between two questions, of well under a millisecond each."""


class FenceWatch:
    """One a rank that writes a run of its own or for all; `close` it. Its thread sleeps but for one small request a second."""

    def __init__(self, ask: Callable[[], str], tell: Callable[[Notice], bool]) -> None:
        """`ask`: who has taken over, '' while nobody has; it may block for a second. `tell`: called once, on the thread."""
        self._ask = ask
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="wbdist-fence", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent; within about a second."""
        self._stop.set()
        self._thread.join(2 * INTERVAL)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            if said := self._ask():
                self._tell(Notice("fence", said, time.monotonic(), fenced=True))
                return
