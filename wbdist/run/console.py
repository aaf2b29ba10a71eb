"""What the process prints, kept line by line with every run that asks for it, while it still reaches the terminal."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

Sink = Callable[[str, str], None]
"""(one line without its end, "stdout" or "stderr"); must not print."""

MAX_LINE = 64 * 1024
"""Characters of one line that are kept; a program that prints without line ends must not fill the memory."""

_COLLAPSE = 1024
"""Characters of an unfinished line from which on what a carriage return has overwritten is forgotten."""

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.|[\r\b]|[^\x1b\r\b]+", re.DOTALL)

_lock = threading.RLock()
_sinks: list[Sink] = []
_tees: dict[str, _Tee] = {}
_retired: list[_Tee] = []
"""Never freed: a `print` on another thread, or the very one whose line a sink gave up at, holds its stream without a reference
(Python up to 3.13), and would go on with freed memory."""


class _Tee:
    """Stands in for `sys.stdout` or `sys.stderr`: passes everything on, and gives finished lines to the sinks.

    A progress bar is one line: its last state (`shown`).
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
        self._line = ""  # a sink may detach itself, which gives the unfinished line
        for line in finished:
            self._give(line)
        if len(rest) > _COLLAPSE and "\r" in rest:  # a bar that was drawn a thousand times is its last state
            before, _, after = rest.rpartition("\r")
            rest = f"{shown(before)}\r{after}"
        self._line = rest[-MAX_LINE:]

    def _give(self, line: str) -> None:
        text = shown(line)[:MAX_LINE]
        for sink in tuple(_sinks):
            sink(text, self._name)

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


def shown(line: str) -> str:
    """What a terminal shows of a line when everything in it has been printed: carriage returns and backspaces overwrite,
    erasing erases, colours stay, cursor moves to other lines and window titles go."""
    if "\r" not in line and "\x1b" not in line and "\b" not in line:
        return line
    cells: list[str] = []
    at, colour = 0, ""
    for token in _TOKEN.finditer(line):
        text = token[0]
        if text == "\r":
            at = 0
        elif text == "\b":
            at = max(0, at - 1)
        elif token[2] == "m":
            colour += text
        elif token[2] in {"C", "D", "G"}:
            count = int(token[1]) if token[1].isdigit() else 1
            at = {"C": at + count, "D": max(0, at - count), "G": max(0, count - 1)}[token[2]]
            cells += [" "] * (min(at, MAX_LINE) - len(cells))
        elif token[2] == "K":
            if token[1] in {"", "0"}:
                del cells[at:]
            else:
                cells[:] = [" "] * at if token[1] == "2" else [" "] * at + cells[at:]
        elif not text.startswith("\x1b"):
            cells[at : at + len(text)] = [colour + text[0], *text[1:]]
            at, colour = at + len(text), ""
    return "".join(cells).rstrip(" ") + colour


def attach(sink: Sink) -> None:
    """From now on `sink` gets every line printed through `sys.stdout` and `sys.stderr`, one at a time.

    Output of C code and of child processes does not pass here and is not seen.
    """
    with _lock:
        _sinks.append(sink)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, _Tee):
                if name in _tees and _tees[name].original is not stream:
                    _retired.append(_tees.pop(name))
                if name not in _tees:
                    _tees[name] = _Tee(name, stream)
                setattr(sys, name, _tees[name])


def detach(sink: Sink) -> None:
    """Undoes `attach`; an unfinished line is given to the sinks first. Idempotent; a sink may call it."""
    with _lock:
        if sink not in _sinks:
            return
        for tee in tuple(_tees.values()):
            tee.finish_line()
        if sink not in _sinks:
            return  # it could not take that line, and has detached itself
        _sinks.remove(sink)
        if _sinks:
            return
        for name, tee in _tees.items():
            # Somebody may have put their own stream over ours meanwhile; then ours stays below it and only passes on.
            if getattr(sys, name) is tee:
                setattr(sys, name, tee.original)


def forget_all() -> None:
    """In a forked child: the parent's runs are not ours to write to."""
    _sinks.clear()
