"""Steps for rows of one run from several processes: the next free one for each, whoever asks.

The counter lies in memory that all have mapped, under a POSIX lock, which the kernel takes back from whoever is killed holding
it. (A lock of multiprocessing would stay taken.) Killed between taking a step and writing the row, a process leaves a gap.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Mapping
from typing import Any, Final

from wbdist.run.handle import Run

_NUMBER: Final = struct.Struct("<Q")
SIZE: Final = 4096


class SharedSteps:
    """The counter of one run; the same in each process that maps its file. About 2 us a step."""

    def __init__(self, fd: int) -> None:
        """`fd`: of `create`, or a duplicate; stays open."""
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        # POSIX locks do not part the threads of one process.
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._after_fork)

    @classmethod
    def create(cls, first: int) -> SharedSteps:
        """In memory alone: no file is left behind, whoever is killed."""
        fd = os.memfd_create("wbdist-steps")
        os.ftruncate(fd, SIZE)
        steps = cls(fd)
        steps.reach(first)
        return steps

    def take(self, at_least: int) -> int:
        """The next free step, for one row."""
        return self._next(at_least, 1)

    def reach(self, step: int) -> int:
        """From now on only steps from `step` on are free; the next free one."""
        return self._next(step, 0)

    def _next(self, at_least: int, count: int) -> int:
        with self._lock:
            fcntl.lockf(self.fd, fcntl.LOCK_EX)
            try:
                step = max(int(_NUMBER.unpack_from(self._map)[0]), at_least)
                _NUMBER.pack_into(self._map, 0, step + count)
            finally:
                fcntl.lockf(self.fd, fcntl.LOCK_UN)
        return step

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


class SteppedRows:
    """A run's rows in a process that shares its steps: a row without a step gets the next free one of all processes."""

    def __init__(self, run: Run, steps: SharedSteps, columns: Mapping[str, Any] | None = None) -> None:
        self.steps = steps
        self.columns = dict(columns or {})
        """Added to each row."""
        self.explicit = False
        """Whether a row has come with a step of its own since this was last set to False."""
        self._journal = run.journal
        run.log_through(self.log)

    def log(self, data: Mapping[str, Any], step: int | None, commit: bool | None) -> bool:
        journal = self._journal
        if self.columns and isinstance(data, Mapping):
            data = {**self.columns, **data}
        with journal.lock:
            rule = journal.rule
            if step is not None:
                self.explicit = True
                self.steps.reach(step + 1)
                return journal.log(data, step, commit)
            if rule.open:
                return journal.log(data, None, commit)
            return journal.log(data, self.steps.take(rule.step), commit is None or commit)
