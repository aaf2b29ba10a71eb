"""Journals whose header cannot be read: whose they probably are, and who must not go on as if they were not there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from wbdist.errors import JobAlreadyRunningError, JournalCorruptError
from wbdist.run.journal import SUFFIX, writer_alive
from wbdist.run.shipper.marks import marked
from wbdist.settings import Settings

_DIRECTORY = re.compile(r"run-\d{8}_\d{6}-(.+)$")
_ATTEMPT = re.compile(rf"\.a(\d+){re.escape(SUFFIX)}$")
_CHUNK = 1 << 20

_said: set[Path] = set()
"""What this process has told of."""


class Unreadable(msgspec.Struct, frozen=True):
    path: Path
    why: str
    """It names the file."""
    attempt: int | None
    """As the file's name says; None when it says nothing."""
    empty: bool
    """Its writer was killed before it began, or the disk lost all of it: there is nothing that could be read one day."""


def look(path: Path, error: JournalCorruptError | OSError, run_id: str) -> Unreadable | None:
    """What can be told of a journal that `error` says cannot be read; None when it is another run's, a feed, or gone."""
    if isinstance(error, FileNotFoundError) or not _is_of(path.parent, run_id) or path.name.startswith("feed"):
        return None
    why = str(error) if isinstance(error, JournalCorruptError) else f"{path} cannot be read: {error.strerror or error}"
    attempt = _ATTEMPT.search(path.name)
    return Unreadable(path, why, int(attempt[1]) if attempt else None, _is_empty(path))


def _is_of(directory: Path, run_id: str) -> bool:
    """By the name that a run's directory is given: `x-1` at its end is the run of that id, or the second of `x` in a second."""
    match = _DIRECTORY.search(directory.name)
    if match is None or match[1] == run_id:
        return match is not None
    first, _, number = directory.name.rpartition("-")
    return match[1] == f"{run_id}-{number}" and number.isdigit() and directory.with_name(first).is_dir()


def _is_empty(path: Path) -> bool:
    """Whether there is nothing in it but the zeros of space reserved ahead."""
    try:
        with path.open("rb") as file:
            return not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(_CHUNK), b""))
    except OSError:
        return False


def tell(settings: Settings, unreadable: Iterable[Unreadable]) -> None:
    """Says in a line, once a process, what is left out; not of a journal that is just being made."""
    for one in unreadable:
        if one.path not in _said and not writer_alive(one.path):
            _said.add(one.path)
            settings.say(f"{one.why}; {'it holds nothing' if one.empty else 'what it holds is left out'}", warning=True)


def refuse(settings: Settings, run_id: str, unreadable: Iterable[Unreadable], newest: int, on_server: int = 0) -> None:
    """To be asked before `run_id` goes on from readable journals that end with attempt `newest`, or from attempt `on_server` on
    the server (0: none, or nobody could ask). Tells of what it lets pass.

    Raises JobAlreadyRunningError when one is being written, JournalCorruptError when one may hold what came last.
    """
    passed = []
    for one in unreadable:
        if writer_alive(one.path):
            raise JobAlreadyRunningError(f"run {run_id!r} is being written by another process on this machine: {one.why}")
        older = one.attempt is not None and (one.attempt < newest or one.attempt < on_server)
        sent = on_server and marked(one.path) and one.attempt in {None, on_server}
        if not (one.empty or older or sent):
            which = "" if one.attempt is None else f" (attempt {one.attempt})"
            raise JournalCorruptError(
                f"run {run_id!r} cannot go on: {one.why}. That journal may hold the newest of the run{which}, and going on "
                "without it would hide that for good. Make the file readable, or bring it back from a copy; to go on without "
                "what it holds, move it out of its directory"
            )
        passed.append(one)
    tell(settings, passed)
