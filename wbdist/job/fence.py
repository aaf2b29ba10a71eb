"""Learning in the middle of training that another job has taken the run over, or that a person wants it stopped.

The server tells the shipper in its answers to lines; the shipper is asked once in a while. What is heard becomes a notice, so
that all ranks stop before the same step. Behind another job nothing is saved then; for a person the job saves, as after a
preemption, but nothing starts it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from wbdist.preemption.notice import Notice
from wbdist.run.shipper.client import Standing

INTERVAL = 1.0
"""Seconds between two questions, of well under a millisecond each."""
SERVER = "server"
"""Source of the notice of a person's stop."""
STOPPED = "somebody asked on the server that this run stop"


class FenceWatch:
    """One a rank that writes a run of its own or for all; `close` it. Its thread sleeps but for one small request a second."""

    def __init__(self, ask: Callable[[], Standing], tell: Callable[[Notice], bool]) -> None:
        """`ask`: what the server has said; it may block for a second. `tell`: called on the thread, once for each of both."""
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
        told = False
        while not self._stop.wait(INTERVAL):
            said = self._ask()
            if said.fenced:
                self._tell(Notice("fence", said.fenced, time.monotonic(), fenced=True))
                return
            if said.stopped and not told:
                told = True
                self._tell(Notice(SERVER, STOPPED, time.monotonic(), cancelled=True))
