"""A file that appears, as a preemption notice: `touch stop` asks a job to save and leave, from a shell, a prolog script, or
another machine with the same file system, where no signal reaches the process.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from wbdist.errors import UsageError
from wbdist.preemption.metadata import EARLY
from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.preemption")

READ_LIMIT = 200
"""Characters of the file's first line that become the notice's reason."""


class FileSource:
    """Gives a notice when `path` exists; its first line, when there is one, is the reason.

    A file that is there already when the source starts counts at once, so whoever made it has to remove it before the job is
    started again: it may just as well have been put there a moment before.
    """

    def __init__(self, path: str | os.PathLike[str], interval: float = 1.0) -> None:
        """`interval`: seconds between two looks, so also how late a notice may come."""
        if interval <= 0:
            raise UsageError(f"interval={interval!r}: give the seconds between two looks at {os.fspath(path)!r}, more than 0")
        self._path = Path(path)
        self._interval = interval
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, tell: Callable[[Notice], bool]) -> None:
        """Any thread. Raises UsageError when the source was started before."""
        if self._thread is not None:
            raise UsageError("this FileSource was started before; make another")
        self._thread = threading.Thread(target=self._watch, args=(tell,), name="wbdist-file-notice", daemon=True)
        self._thread.start()

    def _watch(self, tell: Callable[[Notice], bool]) -> None:
        hidden = False
        while not self._closing.is_set():
            try:
                there = self._path.exists()
            except OSError as error:
                # A file system that is away, or a directory that may not be entered: not there, as far as anybody can tell.
                there = False
                if not hidden:
                    hidden = True
                    log.warning("whether %s exists cannot be seen: %s", self._path, error)
            if there:
                tell(Notice("file", self._reason(), time.monotonic()))
                return
            self._closing.wait(self._interval - min(EARLY, self._interval / 10))

    def _reason(self) -> str:
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                line = file.readline(READ_LIMIT).strip()
        except OSError as error:
            # That it exists is the notice; what it says is only for people.
            log.warning("%s exists but cannot be read: %s", self._path, error)
            line = ""
        return line or f"{self._path} exists"

    def close(self) -> None:
        """Any thread. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(1.0)
