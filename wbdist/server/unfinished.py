"""Connections whose client begins a request and does not go on, or never begins one: closed after a while.

uvicorn has a time limit between two requests, none for the head of one. So all connections are looked at about once a second,
which costs the requests nothing. A body may take its time: how fast it comes is the network's affair, and its size has a limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary


class Unfinished:
    """Those seen so far; one thread."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long the head of a request may take, of a new connection too."""
        self._seconds = seconds
        self._seen: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()

    def close_stale(self, connections: Iterable[Any], now: float) -> int:
        """`connections`: uvicorn's protocols. `now`: monotonic seconds. How many were closed."""
        closed = 0
        for connection in list(connections):
            cycle = connection.cycle  # of the newest request whose head is complete
            waiting = cycle is None or cycle.response_complete
            if not waiting or connection.timeout_keep_alive_task is not None:
                self._seen.pop(connection, None)
                continue
            before, since = self._seen.setdefault(connection, (cycle, now))
            if before is not cycle:
                self._seen[connection] = (cycle, now)
            elif now - since > self._seconds:
                connection.transport.close()
                closed += 1
        return closed
