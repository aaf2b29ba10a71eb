"""All ranks stop before the same unit of work, without a collective per step.

Every rank counts the units it has begun (train steps, or any work with collectives, in the same sequence on all ranks).
Without a request, `begin_unit` is one uncontended lock. On a notice, or when another rank asks, a listener thread raises
a flag *under the same lock* and publishes the count; from then on `begin_unit` waits for `stop_at`, the largest count
published by all ranks, and lets this rank run up to it. A rank that is already inside unit s has published s, so
the others run unit s too and its collectives complete: no rank waits inside a unit for one that has stopped, and all stop
before the same next one. "Stop at the next boundary" would hang, because ranks are not within one step of each other on
the host (with CUDA the host runs ahead); an all-reduce of a flag per step would cost 100 to 600 us each.

A rank that does not publish within the deadline is taken for dead: nobody waits longer, `agreed` is False.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.errors import DeadlineError, Error
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.preemption")

REQUEST = "stop/request"
POLL = 0.25
"""Seconds of one wait for somebody's request; bounds how long `close` takes."""


class StopAgreement:
    """One a rank, made in step on all ranks."""

    def __init__(self, coordinator: Coordinator, hub: NoticeHub, timeout: float) -> None:
        """`timeout`: seconds to wait for every rank's count after a request."""
        self._hub = hub
        self._timeout = timeout
        self._rank, self._world = coordinator.rank, coordinator.world_size
        self._lock = threading.Lock()
        self._units = 0
        self._requested = False
        self._decided = threading.Event()
        self._stop_at = 0
        self._agreed = True
        self._missing = ""
        self._notice: Notice | None = None
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._peers = coordinator.clone()
        hub.on_notice(self._on_notice)
        self._thread: threading.Thread | None = None
        if self._world > 1:
            self._thread = threading.Thread(target=self._listen, name="wbdist-stop", daemon=True)
            self._thread.start()

    @property
    def notice(self) -> Notice | None:
        """The notice that led to the stop: ours, or the one of the rank that asked first."""
        return self._notice

    @property
    def agreed(self) -> bool:
        """Whether all ranks stop before the same unit; False when a rank did not answer in time."""
        return self._agreed

    @property
    def missing(self) -> str:
        """Who did not answer, for people; '' when all did."""
        return self._missing

    def begin_unit(self) -> bool:
        """All ranks, before each unit, same sequence: True to go on; False to stop before this unit, on every rank the same.

        Under a microsecond until a stop is asked for; then blocks until the ranks have agreed, at most `timeout` seconds.
        """
        with self._lock:
            if not self._requested:
                self._units += 1
                return True
        if not self._decided.wait(self._timeout + 5.0):
            self._agreed, self._missing = False, "the listener of this rank"
            return False
        if self._units < self._stop_at:
            self._units += 1
            return True
        return False

    def _on_notice(self, notice: Notice) -> None:
        if self._notice is None:
            self._notice = notice
        if self._world == 1:
            with self._lock:
                self._requested = True
                self._stop_at = self._units
            self._decided.set()
        self._wake.set()

    def _listen(self) -> None:
        try:
            while not self._closing.is_set():
                if self._wake.is_set() and self._notice is not None:
                    asked = msgspec.json.encode(
                        {"rank": self._rank, "reason": self._notice.reason, "source": self._notice.source}
                    )
                    self._agree(self._peers.claim(REQUEST, asked))
                    return
                with contextlib.suppress(DeadlineError):
                    self._agree(self._peers.get(REQUEST, POLL))
                    return
        except Error as error:
            self._give_up(str(error))
        finally:
            self._peers.close()

    def _agree(self, request: bytes) -> None:
        asked = msgspec.json.decode(request)
        if self._notice is None:
            self._notice = Notice("peer", f"rank {asked['rank']}: {asked['reason']}", time.monotonic())
        with self._lock:
            self._requested = True
            units = self._units
        counts = self._peers.gather("stop/units", str(units).encode(), self._timeout)
        self._stop_at = max(int(count) for count in counts)
        self._decided.set()

    def _give_up(self, why: str) -> None:
        log.warning("no agreement on where to stop: %s", why)
        with self._lock:
            self._requested = True
            self._stop_at = 0
        self._agreed, self._missing = False, why
        self._decided.set()

    def close(self) -> None:
        """Stops listening. Idempotent; within about POLL seconds, or when a running agreement ends."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(POLL + 1.0)
