"""POSIX signals as preemption notices.

A Python handler runs between bytecodes of the main thread, which may sit in a collective for minutes. So the signal's
number goes through `signal.set_wakeup_fd`: the interpreter's C-level handler writes it into a pipe at once, and a thread reads
it and tells the hub. The Python handler only repeats that byte (somebody may have replaced the wakeup descriptor since) and
lets a second Ctrl-C through. Rejected: work in the handler, as Lightning does it (it broadcasts there, and hangs unless every
rank gets the signal); polling a flag, which costs every step and is not seen inside a step.

Forked children (DataLoader workers) inherit pipe and handlers: a signal sent to them would read as ours. A fork hook takes
both from them. SIGTERM gets back what it did before, because that is how multiprocessing ends its workers; the others are
ignored there, so that a Ctrl-C at the terminal, or a scheduler that signals every process, does not take away the workers that
the last steps before the save still need.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from wbdist.errors import UsageError
from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.preemption")

DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""SIGUSR2 rather than SIGUSR1: NCCL may catch USR1 (submitit's experience). SIGINT: Ctrl-C is one clean stop."""
UNCATCHABLE = (signal.SIGKILL, signal.SIGSTOP)
STOP = 0
"""Byte that ends the reading thread; no signal has this number."""


class SignalSource:
    """Turns SIGTERM, SIGUSR2 or SIGINT into a notice. Repeating one changes nothing (Slurm under torchrun sends each twice),
    but a second SIGINT raises KeyboardInterrupt in the main thread: the person insists.

    A handler that was there before is called too, after ours; whoever installed it and requeues the job by itself
    should leave these signals out here.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = DEFAULT_SIGNALS,
        grace: float | Mapping[int, float] | None = None,
        explain: Callable[[int], Notice | None] | None = None,
    ) -> None:
        """`grace`: seconds from a signal until the process is killed, when whoever sends it says so; one for all, or by signal.

        `explain` is called with a signal's number after its notice was given, on a thread of its own, and may take seconds
        to find out what stands behind it; what it returns is told as well.
        """
        for number in signals:
            if number == signal.SIGUSR1:
                raise UsageError(
                    "SIGUSR1 cannot be a preemption signal: NCCL may catch it, and the notice would be lost; "
                    "let the scheduler send SIGUSR2 or SIGTERM (wbdist launch passes SIGUSR1 on as SIGTERM)"
                )
            if number in UNCATCHABLE:
                raise UsageError(f"{signal.Signals(number).name} cannot be caught; use SIGTERM or SIGUSR2")
        self._signals = tuple(signals)
        every = {} if grace is None or isinstance(grace, Mapping) else {int(number): grace for number in signals}
        self._graces: Mapping[int, float] = grace if isinstance(grace, Mapping) else every
        self._explain = explain
        self._explained = threading.Event()
        self._explained.set()
        self._asked = False
        self._previous: dict[int, Any] = {}
        self._read = self._write = -1
        self._old_wakeup = -1
        self._thread: threading.Thread | None = None
        self._tell: Callable[[Notice], bool] | None = None
        self._interrupts = 0
        self._taken: set[int] = set()
        self._untaken: set[int] = set()
        self._pid = 0

    def start(self, tell: Callable[[Notice], bool]) -> None:
        """Main thread only: raises UsageError elsewhere, since Python cannot set handlers there, and when started already."""
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("preemption signals can only be watched from the main thread; enter the job there")
        if self._write != -1:
            raise UsageError("this SignalSource was started before; make another")
        self._tell = tell
        self._pid = os.getpid()
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._read, True)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        _started.append(self)
        self._thread = threading.Thread(target=self._listen, name="wbdist-signals", daemon=True)
        self._thread.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        self._repeat(self._write, number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _listen(self) -> None:
        assert self._tell is not None
        while True:
            for number in os.read(self._read, 64):
                if number == STOP:
                    return
                if self._old_wakeup != -1:
                    self._repeat(self._old_wakeup, number)  # whoever had the descriptor before us (asyncio) still hears
                if number not in self._signals:
                    continue
                grace = self._graces.get(number)
                deadline = None if grace is None else time.time() + grace
                self._start_explaining(number)
                taken = self._tell(Notice("signal", signal.Signals(number).name, time.monotonic(), deadline))
                (self._taken if taken else self._untaken).add(number)

    def _start_explaining(self, number: int) -> None:
        if self._explain is not None and not self._asked:
            self._asked = True
            self._explained.clear()
            threading.Thread(target=self._find_out, args=(number,), name="wbdist-explain", daemon=True).start()

    def _find_out(self, number: int) -> None:
        assert self._explain is not None
        assert self._tell is not None
        try:
            found = self._explain(number)
            if found is not None:
                self._tell(found)
        except Exception:
            log.exception("what stands behind %s could not be found out", signal.Signals(number).name)
        finally:
            self._explained.set()

    def settle(self, timeout: float) -> None:
        """Any thread: returns once nothing is being explained, at most after `timeout` seconds."""
        self._explained.wait(timeout)

    @staticmethod
    def _repeat(descriptor: int, number: int) -> None:
        try:
            os.write(descriptor, bytes([number]))
        except (BlockingIOError, BrokenPipeError):
            return  # full of unread signals, of which one is enough; or nobody reads any more

    def _leave_in_child(self) -> None:
        """In a forked child, which has only its main thread."""
        if self._write == -1:
            return
        signal.set_wakeup_fd(-1)
        for number, previous in self._previous.items():
            own = signal.SIG_DFL if previous is None else previous
            signal.signal(number, own if number == signal.SIGTERM else signal.SIG_IGN)
        os.close(self._read)
        os.close(self._write)
        self._read = self._write = -1

    def close(self) -> None:
        """Main thread: gives back handlers and wakeup descriptor. Idempotent; within a second.

        A signal that came too late to be taken by the hub is raised again, for whoever listens now: swallowed, it would leave
        a process that its scheduler thinks warned.
        """
        if self._write == -1 or os.getpid() != self._pid:
            return
        _started.remove(self)
        for number, previous in self._previous.items():
            # None: a handler that was not installed from Python, and cannot be from here.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        signal.set_wakeup_fd(self._old_wakeup)
        os.set_blocking(self._write, True)
        os.write(self._write, bytes([STOP]))
        assert self._thread is not None
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        self._read = self._write = -1
        for number in self._untaken - self._taken:
            signal.raise_signal(number)


_started: list[SignalSource] = []
"""Those of this process, in order: a fork hook cannot be taken back, so there is one for all."""


def _leave_in_child() -> None:
    while _started:
        _started.pop()._leave_in_child()  # noqa: SLF001  (same module)


os.register_at_fork(after_in_child=_leave_in_child)
