"""One hub a process: whatever source speaks first gives the notice; later ones may only shorten the time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

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


class NoticeHub:
    """Collects the notices of its sources. Any thread may ask; `start` and `close` on the main thread."""

    def __init__(self, sources: Sequence[NoticeSource]) -> None:
        self._sources = tuple(sources)
        self._lock = threading.Lock()
        self._notice: Notice | None = None
        self._listeners: list[Callable[[Notice], None]] = []
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
        """Any thread, never a signal handler: gives the hub a notice. False when the hub is closed: it was not taken."""
        with self._lock:
            if self._closed:
                return False
            first = self._notice is None
            if self._notice is None:
                self._notice = notice
            elif notice.deadline is not None and (self._notice.deadline is None or notice.deadline < self._notice.deadline):
                self._notice = msgspec.structs.replace(self._notice, deadline=notice.deadline)
            listeners = list(self._listeners) if first else []
        if first:
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

    def close(self) -> None:
        """Closes the sources, the last started first. Idempotent; within a second a source."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for source in reversed(self._sources):
            source.close()
