"""Which journals a checkpoint must take along: what the server has not acknowledged, or would lose together with this machine.

A preempted machine's disk is lost, and with it every journal that is on it alone. So a save asks for each journal whether
the server has it. What it has not travels in the checkpoint (`checkpoint/history.py`), and comes back where the job goes on
(`run/journal_copy.py`). Both may arrive at the server, the original and the copy: lines are known by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from wbdist.core.tails import JournalCopy, JournalPrefix
from wbdist.errors import FencedError
from wbdist.run import journal_copy
from wbdist.run.journal import JournalReader, writer_alive
from wbdist.run.shipper import client

PATIENCE = 2.0
"""Seconds that a save waits, in the background, for the server to acknowledge the history it covers."""
IMPATIENT = 0.1
"""The same while the server is known to be away: saves must not take turns waiting for it."""


def fenced_message(said: str) -> str:
    """What the shipper said, and what it means for this job."""
    return (
        f"{said.removeprefix('fenced: ')}: this job must stop, and saves nothing more. What it logged is kept in the archive. "
        "Two jobs of one run cannot go on side by side: stop one for good, or give it an id and a checkpoint_dir of its own."
    )


class Tail:
    """Of this rank's run. One thread at a time."""

    def __init__(self, root: Path, copies: Sequence[JournalCopy], say: Callable[[str], None]) -> None:
        """`root`: where the journals of this rank's host lie. `copies`: of the checkpoint that the job continues from. `say`:
        for people, when the server stops or begins again to answer."""
        self._root = root
        self._copies = list(copies)
        self._carried: list[JournalPrefix] | None = None
        self._say = say
        self._safe: set[Path] = set()
        """Journals that nobody writes any more and that the server has."""
        self._walked: dict[Path, tuple[int, int]] = {}
        """Journal -> size and frames of the last prefix: a journal of a million rows is walked through once."""
        self._away = False
        self._in_vain = False
        """The server did not answer for a journal of this save: the others are not asked for."""

    def of(self, cut: Sequence[tuple[Path, int]], step: int) -> list[JournalPrefix]:
        """What has to travel in a checkpoint after `step`, whose history ends with `cut`.

        Waits at most PATIENCE seconds for the server, once: later saves only look, until it is back. Raises FencedError
        when the server says that another attempt has the run; JournalCorruptError or OSError.
        """
        self._in_vain = False
        if self._carried is None:
            found = [journal_copy.locate(self._root, copy) for copy in self._copies]
            self._carried = [prefix for prefix in found if prefix is not None]
        own = [
            self._prefix(path, frame)
            for number, (path, frame) in reversed([*enumerate(cut, 1)])
            if not self._has(path, step, ended=number < len(cut) and not writer_alive(path))
        ]
        self._carried = [prefix for prefix in self._carried if not self._has(Path(prefix.path), step, ended=True)]
        return self._carried + own

    def _prefix(self, path: Path, frame: int) -> JournalPrefix:
        prefix = journal_copy.journal_prefix(path, frame, self._walked.get(path, (0, 0)))
        self._walked[path] = (prefix.size, frame + 1)
        return prefix

    def _has(self, journal: Path, step: int, *, ended: bool) -> bool:
        """Whether the server has all that is in `journal` now, and keeps it when this machine is lost."""
        if journal in self._safe:
            return True
        with JournalReader.open(journal) as reader:
            header = reader.header
        # An embedded server keeps its data on this machine, too.
        if self._in_vain or not header.base_url or not header.online or header.data_dir:
            return False
        patience = IMPATIENT if self._away else PATIENCE
        outcome = client.flush(self._root, journal, patience)
        if outcome.error.startswith("fenced"):
            raise FencedError(fenced_message(outcome.error))
        self._in_vain = not outcome.acked
        if self._away == outcome.acked:
            self._away = not outcome.acked
            if self._away:
                why = outcome.error or f"nothing came back within {patience:g} s"
                self._say(
                    f"run {header.run_id}: the server has not acknowledged the history up to step {step} ({why}); "
                    "checkpoints carry it until it has"
                )
            else:
                self._say(f"run {header.run_id}: the server has the history again, up to step {step}")
        if outcome.acked and ended:
            self._safe.add(journal)
        return outcome.acked
