"""Where a run stood after a step, with the parts that other processes (a pool's workers) write of it.

A part's rows have steps of their own making, so it is the clock of the machine that they share which says what of them came
before: what was logged up to the moment of the run's last row within the cut. A job logs that row when its step is done, so
what its workers do for the next step meanwhile is not in, and is there once when that step is done again.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec

from wbdist.core.position import HISTORY, Counts, RunPosition
from wbdist.core.rows import RowAssembler
from wbdist.distributed.cut import LINES, PositionCursor
from wbdist.errors import JournalCorruptError
from wbdist.run.journal import SUFFIX, JournalReader, Kind, Record


class RunCut:
    """Of one run, in the process that opened it. As PositionCursor otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = PositionCursor([path])
        self._parts: dict[Path, PartCursor] = {}

    def position(self, step: int) -> RunPosition:
        own = self._own.position(step)
        self._find_parts()
        if not self._parts:
            return own
        counts: Counts = {stream: dict(by_writer) for stream, by_writer in own.watermark.counts.items()}
        for part in self._parts.values():
            part.go_on_to(self._own.time)
            for stream, count in part.counts.items():
                counts.setdefault(stream, {})[part.writer] = count
        last = max(own.watermark.step, *(part.step for part in self._parts.values()))
        return msgspec.structs.replace(own, watermark=msgspec.structs.replace(own.watermark, counts=counts, step=last))

    def cut(self) -> list[tuple[Path, int]]:
        parts = [(path, part.frame) for path, part in self._parts.items() if part.frame >= 0]
        own = self._own.cut()
        return [*parts, *own] if own else []

    @property
    def step(self) -> int:
        return self._own.step

    def close(self) -> None:
        self._own.close()
        for part in self._parts.values():
            part.close()

    def _find_parts(self) -> None:
        """A new one may come with each task."""
        for path in self._path.parent.glob(f"*{SUFFIX}"):
            if path == self._path or path in self._parts:
                continue
            with suppress(JournalCorruptError, OSError):  # it is just being made: nothing of it is within the cut
                self._parts[path] = PartCursor(path)


class PartCursor:
    """Walks one part up to a moment. Raises as `JournalReader.open`."""

    def __init__(self, path: Path) -> None:
        self._reader = JournalReader.open(path)
        header = self._reader.header
        self.writer = header.writer
        self.counts: dict[str, int] = {}
        """stream -> lines within the cut."""
        self.frame = -1
        """The last one within the cut."""
        self.step = -1
        """The highest of its rows within the cut."""
        self._rows = RowAssembler(starting_step=header.starting_step, created=header.created)
        self._since_row: list[str] = []
        """Streams of the lines that came while a row is open."""
        self._ahead: list[Record] = []
        """Read, and beyond the cut."""

    def go_on_to(self, time: float) -> None:
        """Takes what was journalled up to `time`, with an open row left out."""
        while self._ahead or (found := self._reader.read()):
            records, self._ahead = self._ahead or found, []
            for number, record in enumerate(records):
                if record.time > time:
                    self._ahead = records[number:]
                    return
                self._take(record)

    def _take(self, record: Record) -> None:
        if record.kind is Kind.ROW:
            self._count(self._rows.add(record.data, record.step, record.commit, record.time))
        elif record.kind in (Kind.COMMIT, Kind.END):
            self._count(self._rows.close())
        elif record.kind in LINES:
            self._since_row.append(LINES[record.kind])
        if not self._rows.open:  # else the frames up to here would bring the row's first half along
            self.frame = record.seq
            for stream in self._since_row:
                self.counts[stream] = self.counts.get(stream, 0) + 1
            self._since_row.clear()

    def _count(self, rows: list[dict[str, object]]) -> None:
        if rows:
            self.counts[HISTORY] = self.counts.get(HISTORY, 0) + len(rows)
            self.step = max(self.step, *(int(str(row["_step"])) for row in rows))

    def close(self) -> None:
        self._reader.close()
