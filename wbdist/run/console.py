"""What the process prints, kept line by line with every run that asks for it, while it still reaches the terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

Sink = Callable[[str, str], None]
"""(one line without its end, "stdout" or "stderr"); must not print."""

MAX_LINE = 64 * 1024
"""Characters of one line that are kept; a program that prints without line ends must not fill the memory."""

_lock = threading.RLock()
_sinks: list[Sink] = []
_tees: dict[str, _Tee] = {}


class _Tee:
    """Stands in for `sys.stdout` or `sys.stderr`: passes everything on, and gives finished lines to the sinks.

    A carriage return starts the line over, as on a terminal, so that a progress bar is one line: its last state.
    """

    def __init__(self, name: str, original: TextIO) -> None:
        self._name = name
        self._original = original
        self._line = ""
        self._busy = False

    def write(self, text: str) -> int:
        written = self._original.write(text)
        with _lock:
            if not self._busy and _sinks:
                self._busy = True  # a sink that prints after all must not come back here
                try:
                    self._keep(text)
                finally:
                    self._busy = False
        return written

    def _keep(self, text: str) -> None:
        *finished, rest = (self._line + text).split("\n")
        for line in finished:
            self._give(line)
        self._line = rest[-MAX_LINE:] if "\r" not in rest else rest[rest.rstrip("\r").rfind("\r") + 1 :][-MAX_LINE:]

    def _give(self, line: str) -> None:
        shown = line.rstrip("\r").rpartition("\r")[2][:MAX_LINE]
        for sink in tuple(_sinks):
            sink(shown, self._name)

    def finish_line(self) -> None:
        if self._line:
            line, self._line = self._line, ""
            self._give(line)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # fileno, isatty, buffer, encoding, flush, ...
        return getattr(self._original, name)

    @property
    def original(self) -> TextIO:
        return self._original


def attach(sink: Sink) -> None:
    """From now on `sink` gets every line printed through `sys.stdout` and `sys.stderr`, one at a time.

    Output of C code and of child processes does not pass here and is not seen.
    """
    with _lock:
        _sinks.append(sink)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, _Tee):
                _tees[name] = _Tee(name, stream)
                setattr(sys, name, _tees[name])


def detach(sink: Sink) -> None:
    """Undoes `attach`; an unfinished line is given to the sinks first. Idempotent."""
    with _lock:
        if sink not in _sinks:
            return
        for tee in _tees.values():
            tee.finish_line()
        _sinks.remove(sink)
        if _sinks:
            return
        for name, tee in list(_tees.items()):
            # Somebody may have put their own stream over ours meanwhile; then ours stays below it and only passes on.
            if getattr(sys, name) is tee:
                setattr(sys, name, tee.original)
                del _tees[name]


def forget_all() -> None:
    """In a forked child: the parent's runs are not ours to write to."""
    _sinks.clear()
