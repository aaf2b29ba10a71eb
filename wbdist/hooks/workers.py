"""A loader's worker processes: deaf to the notices that the training process answers, and gone with it."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util  # whose own exit function, registered by this, waits for workers: ours must come before
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

_PR_SET_PDEATHSIG = 1
_IGNORED = (signal.SIGTERM, signal.SIGINT)
_all: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
"""Of all loaders of this process."""


class Workers:
    """Of one loader; called in each worker before its first sample."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then
        self._parent = 0
        self._mask: set[int] = set()
        self._processes: weakref.WeakSet[BaseProcess] = weakref.WeakSet()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Workers start inside: what reaches them before they can ignore it waits until they do."""
        # The kernel kills a child that asked for it when the *thread* that started it ends: only the main one lasts.
        self._parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        before = set(multiprocessing.active_children())
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            started = set(multiprocessing.active_children()) - before
            self._processes.update(started)
            _all.update(started)

    def kill(self) -> None:
        """Main thread: ends them now, whatever they are waiting for. The iterator that they work for is of no use any more."""
        _kill(self._processes)

    def __call__(self, worker: int) -> None:
        self._processes.clear()
        signal.set_wakeup_fd(-1)  # a forked worker shares the parent's: its signals would be read as the parent's
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        if self._parent and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != self._parent:  # it died before the request
                os.kill(os.getpid(), signal.SIGKILL)
        if self._then is not None:
            self._then(worker)


def _kill(processes: weakref.WeakSet[BaseProcess]) -> None:
    workers = list(processes)
    processes.clear()
    if not workers:
        return
    was = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a worker's death for a failure
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, was)


# At this process's exit: multiprocessing would end them by SIGTERM, which they ignore, and wait for them.
atexit.register(_kill, _all)
os.register_at_fork(after_in_child=_all.clear)
