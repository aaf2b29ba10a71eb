"""What callers of a pool hold: results that come later, in the forms that `multiprocessing.Pool` gives them."""

from __future__ import annotations

import collections
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import TimeoutError as StandardTimeoutError
from time import monotonic
from typing import Any, Self

from multiprocess import TimeoutError as PackageTimeoutError

from wbdist.errors import DeadlineError, UsageError


class PoolTimeoutError(DeadlineError, StandardTimeoutError, PackageTimeoutError):  # type: ignore[misc]  # untyped package
    """No result within the `timeout` that was given. A TimeoutError of `multiprocessing`, and of `multiprocess`."""


class Job:
    """Calls of one function whose results belong together. Results come from the keeper's thread."""

    def __init__(self, number: int, function: bytes, what: str) -> None:
        self.number = number
        self.function = function
        self.what = what
        """For messages: `map(square)`."""
        self.waiting = 0
        """Chunks not yet given to a worker; the keeper's."""

    @property
    def settled(self) -> bool:
        """Whether all its results are here."""
        raise NotImplementedError

    def put(self, index: int, good: bool, value: Any) -> None:
        raise NotImplementedError

    def fail_rest(self, make: Callable[[], BaseException]) -> None:
        """No more results will come."""
        raise NotImplementedError


class AsyncResult(Job):
    """What `apply_async` returns: one result."""

    def __init__(
        self,
        number: int,
        function: bytes,
        what: str,
        callback: Callable[[Any], Any] | None,
        error_callback: Callable[[BaseException], Any] | None,
    ) -> None:
        super().__init__(number, function, what)
        self._event = threading.Event()
        self._callback = callback
        self._error_callback = error_callback
        self._error: BaseException | None = None
        self._value: Any = None

    @property
    def settled(self) -> bool:
        return self._event.is_set()

    def ready(self) -> bool:
        return self._event.is_set()

    def successful(self) -> bool:
        """Whether the call ended without an exception. Raises ValueError when it has not ended."""
        if not self.ready():
            raise ValueError(f"{self.what} is not ready yet")
        return self._error is None

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until it is ready, at most `timeout` seconds."""
        self._event.wait(timeout)

    def get(self, timeout: float | None = None) -> Any:
        """The value, or raises what the call raised, with the worker's traceback as its cause; WorkerLostError when the worker
        was killed meanwhile. Raises PoolTimeoutError after `timeout` seconds."""
        if not self._event.wait(timeout):
            raise PoolTimeoutError(f"{self.what} is not done after {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def put(self, index: int, good: bool, value: Any) -> None:
        del index
        self._settle(None if good else value, value)

    def fail_rest(self, make: Callable[[], BaseException]) -> None:
        if not self.ready():
            self._settle(make(), None)

    def _settle(self, error: BaseException | None, value: Any) -> None:
        self._error, self._value = error, value
        callback = self._callback if error is None else self._error_callback
        # The callback comes first, as in multiprocessing: who sees `ready()` may rely on it.
        if callback is not None:
            try:
                callback(value if error is None else error)
            except BaseException:  # noqa: BLE001  (SystemExit, too: it runs in the thread that serves all workers)
                sys.stderr.write(f"the callback of {self.what} failed:\n{traceback.format_exc()}")
        self._event.set()


class MapResult(AsyncResult):
    """What `map_async` and `starmap_async` return: a list of results, in order."""

    def __init__(  # noqa: PLR0917  (one more than what it is built on)
        self, number: int, function: bytes, what: str, size: int, callback: Any, error_callback: Any
    ) -> None:
        super().__init__(number, function, what, callback, error_callback)
        self._results: list[Any] = [None] * size
        self._left = set(range(size))
        self._first: tuple[int, BaseException] | None = None
        if size == 0:
            self._settle(None, [])

    def put(self, index: int, good: bool, value: Any) -> None:
        if index not in self._left:
            return
        self._left.remove(index)
        if good:
            self._results[index] = value
        elif self._first is None or index < self._first[0]:
            self._first = (index, value)
        if not self._left:
            self._settle(self._first[1] if self._first is not None else None, self._results)

    def fail_rest(self, make: Callable[[], BaseException]) -> None:
        if self._left:
            first = min(self._left)
            self._left.clear()
            if self._first is None or first < self._first[0]:
                self._first = (first, make())
            self._settle(self._first[1], None)


class ResultIterator(Job):
    """What `imap` and `imap_unordered` return. Goes on behind a call that failed: its exception is raised in its place."""

    def __init__(self, number: int, function: bytes, what: str, *, ordered: bool) -> None:
        super().__init__(number, function, what)
        self.completed = 0
        """Calls that have ended so far, those not yet fetched included."""
        self.total: int | None = None
        """Calls in all; known once the iterable has come to its end."""
        self._changed = threading.Condition()
        self._ordered = ordered
        self._ready: collections.deque[tuple[bool, Any]] = collections.deque()
        self._early: dict[int, tuple[bool, Any]] = {}
        self._given = 0
        """Results in `_ready` or fetched."""
        self._last: BaseException | None = None

    @property
    def settled(self) -> bool:
        return self.total is not None and self.completed >= self.total

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next result; blocks at most `timeout` seconds, then raises PoolTimeoutError."""
        deadline = None if timeout is None else monotonic() + timeout
        with self._changed:
            while not self._ready:
                if self.total is not None and self._given >= self.total:
                    raise StopIteration
                if self._last is not None:
                    self.total = self._given
                    raise self._last
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise PoolTimeoutError(f"{self.what} has no further result after {timeout:g} s")
                self._changed.wait(left)
            good, value = self._ready.popleft()
        if not good:
            raise value
        return value

    def put(self, index: int, good: bool, value: Any) -> None:
        with self._changed:
            self.completed += 1
            if not self._ordered:
                self._ready.append((good, value))
                self._given += 1
            else:
                self._early[index] = (good, value)
                while self._given in self._early:
                    self._ready.append(self._early.pop(self._given))
                    self._given += 1
            self._changed.notify_all()

    def ends_at(self, total: int) -> None:
        with self._changed:
            self.total = total
            self._changed.notify_all()

    def fail_rest(self, make: Callable[[], BaseException]) -> None:
        with self._changed:
            if self.total is None or self._given < self.total:
                self._last = self._last or make()
                self.total = None
            self._changed.notify_all()


def chunked(size: int, items: Iterator[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def check_chunksize(size: int) -> int:
    if type(size) is not int or size < 1:
        raise UsageError(f"chunksize={size!r} must be a whole number, 1 or more")
    return size
