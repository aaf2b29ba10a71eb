"""Where a run stood after a given step, read from its own journals: what a checkpoint stores as the run's position.

Saving is asynchronous: when the position of step s is asked for, rows of later steps may lie in the journal already. So
it is not the moment of the asking that counts. The journal says it exactly, row by row, as the shipper and the server see it.

A cut lies right behind a row. What was journalled after it (printed lines, a changed summary) belongs to the next step, which a
resumed job does again; whether it was there already when we looked must not make a difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wbdist.core.position import ALERTS, ARTIFACTS, CONSOLE, EVENTS, FILES, HISTORY, RunPosition, Watermark
from wbdist.core.rows import RowAssembler
from wbdist.core.summary import SummaryTracker
from wbdist.run.journal import JournalReader, Kind, Record

LINES = {
    Kind.CONSOLE: CONSOLE,
    Kind.STATS: EVENTS,
    Kind.ALERT: ALERTS,
    Kind.FILE: FILES,
    Kind.ARTIFACT: ARTIFACTS,
}
"""Kind -> the stream in which each record of it is one line."""


class _Row(NamedTuple):
    """A row that was read."""

    before: list[tuple[str, Any]]
    """What came between it and the row before."""
    writer: str
    row: dict[str, Any]
    end: tuple[int, int]
    """Journal and frame behind which it is complete."""


class PositionCursor:
    """Walks an attempt's journals up to a step. Not thread-safe. Each record is read once, however often it is asked.

    `paths`: the journals of this attempt in order; all but the last belong to writers that ended. Raises OSError and
    JournalCorruptError as `JournalReader.open` does.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._readers = deque(JournalReader.open(path) for path in paths)
        header = self._readers[0].header
        self._header = header
        self._counts: dict[str, dict[str, int]] = {HISTORY: {}, CONSOLE: {}}
        self._step = header.starting_step - 1
        self._time = header.created
        self._runtime = header.runtime
        self._summary = SummaryTracker(header.summary)
        self._waiting: deque[_Row] = deque()
        """Rows read that lie behind the last cut."""
        self._paths = list(paths)
        self._end = (-1, -1)
        """Journal (by its place in `paths`) and frame where the cut lies."""
        self._frame = -1
        """The last frame read of the current journal."""
        self._since_row: list[tuple[str, Any]] = []
        """What came after the last row that was read."""
        self._whole: list[int] = []
        """The last frames of the journals that were read to their ends."""
        self._begin(self._readers[0])

    def position(self, step: int) -> RunPosition:
        """The position when `step` was complete; `step` must not be lower than in an earlier call. Reads what the journal holds
        now, so rows of `step` must be closed before. Does not block beyond reading."""
        while self._consume(step):
            reader = self._readers[0]
            records = reader.read()
            if not records:
                if len(self._readers) == 1:
                    break
                self._finish_reader()
                continue
            for record in records:
                self._take(record)
        header = self._header
        return RunPosition(
            run_id=header.run_id,
            project=header.project,
            entity=header.entity,
            watermark=Watermark(
                attempt=header.attempt, counts={stream: dict(of) for stream, of in self._counts.items()}, step=self._step
            ),
            summary=self._summary.state(),
            runtime=self._runtime,
        )

    def cut(self) -> list[tuple[Path, int]]:
        """The journals that hold what is within the cut, each with its last frame there; none when no row is."""
        journal, frame = self._end
        return [*zip(self._paths[:journal], self._whole, strict=False), (self._paths[journal], frame)] if journal >= 0 else []

    @property
    def step(self) -> int:
        """Of the last row within the cut; one below the starting step when there is none."""
        return self._step

    @property
    def time(self) -> float:
        """Unix time of that row; when the attempt began when there is none."""
        return self._time

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _begin(self, reader: JournalReader) -> None:
        self._writer = reader.header.writer
        self._counts[HISTORY].setdefault(self._writer, 0)
        self._counts[CONSOLE].setdefault(self._writer, 0)
        self._rows = RowAssembler(
            starting_step=reader.header.starting_step,
            created=reader.header.created,
            runtime=reader.header.runtime,
            summary=reader.header.summary,
        )

    def _finish_reader(self) -> None:
        """A predecessor's journal is read to its end; its open row counts, as it does for the shipper."""
        self._queue_rows(self._rows.close(), self._frame)
        self._readers.popleft().close()
        self._whole.append(self._frame)
        self._frame = -1
        self._begin(self._readers[0])

    def _take(self, record: Record) -> None:
        before, self._frame = self._frame, record.seq
        if record.kind is Kind.ROW:
            finished = self._rows.add(record.data, record.step, record.commit, record.time)
            if finished and not self._rows.open:
                own = finished.pop()
                self._queue_rows(finished, before)
                self._queue_rows([own], record.seq)
            else:
                self._queue_rows(finished, before)
        elif record.kind in (Kind.COMMIT, Kind.END):
            self._queue_rows(self._rows.close(), record.seq)
        elif record.kind is Kind.SUMMARY:
            self._since_row.append(("summary", record.data))
        elif record.kind is Kind.DEFINE and "name" in record.data:
            self._rows.define(record.data)
            self._since_row.append(("define", record.data))
        elif record.kind in LINES:
            self._since_row.append(("line", (LINES[record.kind], self._writer)))

    def _queue_rows(self, rows: list[dict[str, Any]], frame: int) -> None:
        """`frame`: the one that finished them, or the last one before the call that did."""
        for row in rows:
            self._waiting.append(_Row(self._since_row, self._writer, row, (len(self._whole), frame)))
            self._since_row = []

    def _consume(self, step: int) -> bool:
        """Takes rows up to `step` into the cut, each with what came before it; True when more has to be read."""
        waiting = self._waiting
        while waiting:
            before, writer, row, end = waiting[0]
            if row["_step"] > step:
                return False
            self._end = end
            for what, value in before:
                if what == "line":
                    stream, of = value
                    of_stream = self._counts.setdefault(stream, {})
                    of_stream[of] = of_stream.get(of, 0) + 1
                elif what == "define":
                    self._summary.define(value)
                else:
                    self._summary.change(value.get("set", {}), value.get("delete", ()))
            self._counts[HISTORY][writer] += 1
            self._step = row["_step"]
            self._time = row["_timestamp"]
            self._runtime = row["_runtime"]
            self._summary.add_row(row)
            waiting.popleft()
        return True
