"""One hub a process: whatever source speaks first gives the notice; later ones may only shorten the time.

Metadata services and the like are asked by one process a host (`sources.py`); the others learn of the notice through the
agreement. Signals are watched by every process, since each of them gets them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.preemption")


class NoticeSource(Protocol):
    """Something that may say that the job must stop."""

    def start(self, tell: Callable[[Notice], bool]) -> None:
        """Begins to listen. `tell` may be called from any thread of the source (never from a signal handler: it takes a
        lock), any number of times; it returns False when nobody listens any more."""
        ...

    def close(self) -> None:
        """Stops listening and gives back what it took (signal handlers). Idempotent; returns within a second."""
        ...


@runtime_checkable
class Approver(Protocol):
    """A source whose provider waits for a word that it may go ahead."""

    @property
    def approvable(self) -> bool:
        """Whether the provider waits."""
        ...

    def approve(self) -> None:
        """Gives that word: within seconds the machine is gone. Idempotent."""
        ...


@runtime_checkable
class Explainer(Protocol):
    """A source that finds out more about a notice after it was given."""

    def settle(self, timeout: float) -> None:
        """Returns once it has, at most after `timeout` seconds."""
        ...


class NoticeHub:
    """Collects the notices of its sources. Any thread may ask; `start` and `close` on the main thread."""

    def __init__(self, sources: Sequence[NoticeSource]) -> None:
        self._sources = tuple(sources)
        self._lock = threading.Lock()
        self._notice: Notice | None = None
        self._listeners: list[Callable[[Notice], None]] = []
        self._advice_listeners: list[Callable[[Notice], None]] = []
        self._closed = False

    @property
    def notice(self) -> Notice | None:
        """The notice in force, None before there is one: the first, with the earliest deadline that any has named."""
        return self._notice

    def start(self) -> None:
        """Starts every source; when one cannot start, those before it are closed and its error is raised."""
        started: list[NoticeSource] = []
        try:
            for source in self._sources:
                source.start(self.tell)
                started.append(source)
        except BaseException:
            for source in reversed(started):
                source.close()
            raise

    def tell(self, notice: Notice) -> bool:
        """Any thread, never a signal handler: gives the hub a notice. False when the hub is closed: it was not taken.

        Of a later one only its deadline, when it is earlier, and that the job was cancelled, are taken over.
        """
        with self._lock:
            if self._closed:
                return False
            first = self._notice is None
            if notice.advice:
                listeners = list(self._advice_listeners) if first else []
            elif self._notice is None:
                self._notice = notice
                listeners = list(self._listeners)
            else:
                self._notice = _merged(self._notice, notice)
                listeners = []
        if notice.advice:
            log.info("advice from %s: %s", notice.source, notice.reason)
        elif first:
            # What a fenced job is told ends up in its FencedError.
            level = logging.INFO if notice.fenced else logging.WARNING
            log.log(level, "preemption notice from %s: %s", notice.source, notice.reason)
        for listener in listeners:
            listener(notice)
        return True

    def on_notice(self, listener: Callable[[Notice], None]) -> None:
        """`listener` is called once, on the thread of the source that spoke first; at once when there is a notice already.
        It must not block: the source cannot hear while it runs."""
        with self._lock:
            notice = self._notice
            if notice is None:
                self._listeners.append(listener)
        if notice is not None:
            listener(notice)

    def on_advice(self, listener: Callable[[Notice], None]) -> None:
        """`listener` is called with each advice from now on, on the thread of its source, as long as there is no notice. It
        must not block."""
        with self._lock:
            self._advice_listeners.append(listener)

    def settle(self, timeout: float) -> None:
        """Any thread: returns once the sources know all about the notice, at most after `timeout` seconds each."""
        for source in self._sources:
            if isinstance(source, Explainer):
                source.settle(timeout)

    @property
    def approvable(self) -> bool:
        """Whether a provider waits for `approve`."""
        return any(source.approvable for source in self._sources if isinstance(source, Approver))

    def approve(self) -> None:
        """Any thread, when nothing more has to be saved from this machine: tells the providers that wait for it to go ahead."""
        for source in self._sources:
            if isinstance(source, Approver):
                source.approve()

    def close(self) -> None:
        """Closes the sources, the last started first. Idempotent; within a second a source."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for source in reversed(self._sources):
            source.close()


def _merged(standing: Notice, later: Notice) -> Notice:
    deadlines = [notice.deadline for notice in (standing, later) if notice.deadline is not None]
    return msgspec.structs.replace(
        standing, deadline=min(deadlines, default=None), cancelled=standing.cancelled or later.cancelled
    )
