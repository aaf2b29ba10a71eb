"""POSIX signals as preemption notices.

The handler only writes one byte into a pipe; a thread reads it and tells the hub. A Python handler runs between
bytecodes of the main thread, which may sit in a collective for minutes, so even that would come too late: the signal's
number reaches the pipe through `signal.set_wakeup_fd`, which the interpreter's C-level handler writes at once, and the
Python handler has nothing left to do (the rejected alternatives: work in the handler, as Lightning does, which hangs when it
broadcasts; polling a flag, which costs every step). The pipe is inherited by forked DataLoader workers, whose signals
would then read as ours: the byte consumer cannot tell them apart, so a fork hook takes the pipe away from children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from wbdist.errors import UsageError
from wbdist.preemption.notice import Notice

DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""SIGUSR2 rather than SIGUSR1: NCCL may catch USR1 (submitit's experience). SIGINT: Ctrl-C is one clean stop."""


class SignalSource:
    """Turns the first SIGTERM, SIGUSR2 or SIGINT into a notice; further ones change nothing, but a second SIGINT raises
    KeyboardInterrupt in the main thread: the person insists.
    """

    def __init__(self, signals: Sequence[signal.Signals] = DEFAULT_SIGNALS, grace: float | None = None) -> None:
        """`grace`: seconds from the signal until the process is killed, when whoever sends it says so."""
        if signal.SIGUSR1 in signals:
            raise UsageError(
                "SIGUSR1 cannot be a preemption signal: NCCL may catch it and the notice is lost; use SIGUSR2 or SIGTERM"
            )
        self._signals = tuple(signals)
        self._grace = grace
        self._previous: dict[int, Any] = {}
        self._read = self._write = -1
        self._old_wakeup = -1
        self._thread: threading.Thread | None = None
        self._tell: Callable[[Notice], None] | None = None
        self._interrupts = 0
        self._pid = 0

    def start(self, tell: Callable[[Notice], None]) -> None:
        """Main thread only. Raises UsageError elsewhere, since Python cannot set handlers there."""
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("preemption signals can only be watched from the main thread; enter the job there")
        self._tell = tell
        self._pid = os.getpid()
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._read, True)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=self._leave_in_child)
        self._thread = threading.Thread(target=self._listen, name="wbdist-signals", daemon=True)
        self._thread.start()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # The byte is in the pipe already. Only the insisting Ctrl-C acts here, on the main thread, as Python's own does.
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def _listen(self) -> None:
        while True:
            try:
                numbers = os.read(self._read, 64)
            except OSError:
                return
            if not numbers or 0 in numbers:
                return
            for number in numbers:
                if number in self._signals and self._tell is not None:
                    now = time.monotonic()
                    deadline = None if self._grace is None else now + self._grace
                    self._tell(Notice("signal", signal.Signals(number).name, now, deadline))

    def _leave_in_child(self) -> None:
        if self._write == -1 or os.getpid() == self._pid:
            return
        with contextlib.suppress(ValueError, OSError):
            signal.set_wakeup_fd(-1)
        for number, previous in self._previous.items():
            with contextlib.suppress(ValueError, OSError, TypeError):
                signal.signal(number, previous)
        self._tell = None

    def close(self) -> None:
        """Main thread: restores handlers and wakeup descriptor. Idempotent."""
        if self._write == -1 or os.getpid() != self._pid:
            return
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()
        signal.set_wakeup_fd(self._old_wakeup)
        os.write(self._write, b"\0")
        if self._thread is not None:
            self._thread.join(1.0)
        os.close(self._read)
        os.close(self._write)
        self._read = self._write = -1
