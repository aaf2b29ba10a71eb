"""Requests to a c10d store with a deadline, which torch's client does not have."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from wbdist.errors import PeerLostError

T = TypeVar("T")

SILENCE = 10.0
"""Seconds that a store may take to answer before it counts as gone; a busy host takes milliseconds."""
_SLICE = 0.5

_Queue = SimpleQueue[tuple[Callable[[], Any], "Future[Any]"] | None]


def gone(error: RuntimeError) -> PeerLostError:
    """What torch's errors mean."""
    return PeerLostError(f"the store that joins the ranks is gone (the process that hosted it ended): {error}")


class Asker:
    """One request after the other, each on a thread of its own that waits for the answer. Any thread.

    torch's client waits for an answer without end, whatever its timeout (2.13: a `check` on a stopped host returned when the
    host went on), and answers come in the order of requests: so whoever asks can only leave, and the connection's thread waits
    on. This adds 15 to 100 us to a request. Rejected: a thread for each wait; none can be started any more while Python ends.
    """

    def __init__(self) -> None:
        self._queue: _Queue = SimpleQueue()
        threading.Thread(target=_answer, args=(self._queue,), name="wbdist-store", daemon=True).start()
        weakref.finalize(self, self._queue.put, None).atexit = False  # runs are finished at the very end, and ask

    def __call__(self, request: Callable[[], T], timeout: float | None = None) -> T:
        """What `request` returns, within `timeout` seconds and SILENCE (None: whenever it comes).

        A request that nobody waits for any more is made all the same, unless it has not begun. Raises PeerLostError.
        """
        answer: Future[T] = Future()
        self._queue.put((request, answer))
        try:
            return answer.result() if timeout is None else _within(answer, max(timeout, 0.0) + SILENCE)
        except TimeoutError:
            raise PeerLostError(
                f"the store that joins the ranks has not answered for {max(timeout or 0.0, 0.0) + SILENCE:.0f} s: the process "
                "that hosts it (rank 0, or torchrun's agent) is stopped, or its machine is gone"
            ) from None
        except RuntimeError as error:
            raise gone(error) from error
        finally:
            answer.cancel()


def _within(answer: Future[T], seconds: float) -> T:
    """In slices, none of which counts for more than it is: a job that was suspended as a whole (SIGSTOP, a frozen machine)
    hears the answer when it goes on, though the clock went on without it."""
    while seconds > 0:
        began = time.monotonic()
        try:
            return answer.result(min(_SLICE, seconds))
        except TimeoutError:
            seconds -= min(_SLICE, time.monotonic() - began)
    raise TimeoutError


def _answer(queue: _Queue) -> None:
    while (asked := queue.get()) is not None:
        request, answer = asked
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(request())
            except BaseException as error:  # noqa: BLE001  (it is the asker's)
                answer.set_exception(error)
        del asked, request, answer
