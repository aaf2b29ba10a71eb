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

    def start(self, tell: Callable[[Notice], None]) -> None:
        """Begins to listen. `tell` may be called from any thread, any number of times."""
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
        """The notice in force, None before there is one."""
        return self._notice

    def start(self) -> None:
        """Starts every source; when one cannot start, those before it are closed and its error is raised."""
        started: list[NoticeSource] = []
        try:
            for source in self._sources:
                source.start(self.tell)
                started.append(source)
        except BaseException:
            for source in started:
                source.close()
            raise

    def tell(self, notice: Notice) -> None:
        """Any thread, never a signal handler: gives the hub a notice."""
        with self._lock:
            if self._closed:
                return
            first = self._notice is None
            if self._notice is None:
                self._notice = notice
            elif notice.deadline is not None and (self._notice.deadline is None or notice.deadline < self._notice.deadline):
                self._notice = msgspec.structs.replace(self._notice, deadline=notice.deadline)
            listeners = list(self._listeners)
        if first:
            log.warning("preemption notice from %s: %s", notice.source, notice.reason)
            for listener in listeners:
                listener(notice)

    def on_notice(self, listener: Callable[[Notice], None]) -> None:
        """`listener` is called once, on the thread of the source that spoke first; at once when there is a notice already."""
        with self._lock:
            self._listeners.append(listener)
            notice = self._notice
        if notice is not None:
            listener(notice)

    def close(self) -> None:
        """Closes the sources. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for source in reversed(self._sources):
            source.close()
