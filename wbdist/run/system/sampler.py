"""The thread that samples: one a process, for all its runs. It sleeps but for about 0.3 ms every 15 s (a setting)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from wbdist.run.system.gpus import Gpus
from wbdist.run.system.readings import HostReadings, Metrics, ProcessReadings

logger = logging.getLogger("wbdist.run")

FIRST_SECONDS = 1.0
"""The first sample comes after this, if not after the interval: shares need two readings, and short runs want one sample."""

Sink = Callable[[Metrics], None]
"""Takes one sample; on the sampler's thread."""


class Subscription:
    """What one run asked for."""

    def __init__(
        self,
        sink: Sink,
        interval: float,
        *,
        host: bool = True,
        label: str = "",
        disk_paths: tuple[str, ...] = ("/",),
        gpus: tuple[int, ...] | None = None,
    ) -> None:
        """`host`: the machine's numbers too, not only this process's. `label`: tells writers of one run apart, `/l:<label>`."""
        self._sink = sink
        self.interval = interval
        self.due = time.monotonic() + min(FIRST_SECONDS, interval)
        self._suffix = f"/l:{label}" if label else ""
        self._process = ProcessReadings()
        self._host = _host_readings(disk_paths) if host else None
        self._gpus = Gpus.found(gpus) if host else None

    def sample(self, now: float) -> None:
        found = self._process.read()
        if self._host is not None:
            found |= self._host.read()
        if self._gpus is not None:
            found |= self._gpus.read()
        # A machine that slept does not catch up.
        self.due = max(self.due + self.interval, now + self.interval / 2)
        self._sink({f"system.{name}{self._suffix}": value for name, value in found.items()})


def _host_readings(disk_paths: tuple[str, ...]) -> HostReadings | None:
    try:
        return HostReadings(disk_paths)
    except (ValueError, IndexError) as error:
        logger.warning("this machine's system metrics cannot be read: %s", error)
        return None


class _Sampler:
    """The thread and its subscriptions."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._subscriptions: list[Subscription] = []
        self._thread: threading.Thread | None = None

    def add(self, subscription: Subscription) -> None:
        with self._changed:
            self._subscriptions.append(subscription)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="wbdist-system-metrics", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def remove(self, subscription: Subscription) -> None:
        """When it returns, the sink is not called any more."""
        with self._changed:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
                self._changed.notify()

    def _work(self) -> None:
        with self._changed:
            while self._subscriptions:
                now = time.monotonic()
                due = min(each.due for each in self._subscriptions)
                if due > now:
                    self._changed.wait(due - now)
                    continue
                for each in [one for one in self._subscriptions if one.due <= now]:
                    try:
                        each.sample(now)
                    except Exception as error:  # noqa: BLE001  (said, and ended, for this run alone)
                        logger.warning("system metrics are not sampled any more: %s: %s", type(error).__name__, error)
                        self._subscriptions.remove(each)
            self._thread = None


_sampler = _Sampler()


def subscribe(subscription: Subscription) -> None:
    _sampler.add(subscription)


def unsubscribe(subscription: Subscription) -> None:
    """Idempotent; waits for a sample that is being taken."""
    _sampler.remove(subscription)


def forget_all() -> None:
    """In a forked child: the thread and the runs are the parent's."""
    global _sampler  # noqa: PLW0603
    _sampler = _Sampler()
