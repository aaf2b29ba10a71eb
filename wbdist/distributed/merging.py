"""Strategy rank0: all ranks' feeds in, the one run's journal out.

No connections, no processes: the aggregator feeds it what arrives, a replay (`distributed/replay.py`) what lies on disk, and
both write the same rows. It holds no state that is not in journals: a successor takes the feeds from their first byte, and
leaves out what its predecessors' journals hold. A journal is never opened again for writing, so a successor is a new writer of
the same attempt, `rank0.1` after `rank0`, with a sequence of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from wbdist.distributed.alignment import StepAligner
from wbdist.distributed.intake import FeedRow, FeedRows, Layout, Layouts, reduced
from wbdist.errors import EXIT_RETRYABLE
from wbdist.run.journal import FrameDecoder, JournalReader, JournalWriter, Kind, Record

OF_RANK = "_rank"
"""Key of a sample of system metrics in the run's journal: the rank that took it."""


class Feed:
    """One rank's feed, as far as it was taken."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.decoder = FrameDecoder()
        self.rows: FeedRows | None = None
        """None: it has not begun yet."""
        self.layouts: dict[int, Layout] = {}
        """By the numbers of its journal's schemas."""
        self.received = 0
        """Bytes of its journal taken, counted from the first frame."""
        self.promise = (0, 0)
        """(offset, step): with the journal taken up to `offset`, the rank adds nothing below `step`."""
        self.sampled = 0.0
        """Unix time of its last sample of system metrics that the run has."""
        self.ended: dict[str, Any] | None = None
        self.lost_at: int | None = None
        """The step it had not passed when it was lost."""

    @property
    def gone(self) -> bool:
        return self.ended is not None or self.lost_at is not None


class Merger:
    """Of one attempt. One thread."""

    def __init__(
        self, feeds: Sequence[Feed], journal: JournalWriter, earlier: Sequence[Path], preempting: Callable[[float], None]
    ) -> None:
        """`feeds`: of all ranks, in their order. `journal`: the run's, whose header says where the attempt starts. `earlier`:
        journals of this attempt's run by predecessors, oldest first. `preempting` is told, with the time, that rank 0 has
        marked the run. Raises JournalCorruptError, OSError."""
        self.aligner: StepAligner[FeedRow] = StepAligner(len(feeds), journal.header.starting_step)
        self.rows = 0
        """Written."""
        self.ended = False
        """A predecessor wrote the run's end."""
        self.was_preempting = False
        """A predecessor marked the run."""
        self._feeds = feeds
        self._journal = journal
        self._preempting = preempting
        self._layouts = Layouts()
        self._passed_on: deque[tuple[Kind, float]] = deque()
        """Records of predecessors that rank 0's feed may bring again: what they passed on, and a few of their own."""
        self._held: deque[tuple[int, Record]] = deque()
        """Records of rank 0 that wait until every step below the one named is written: they keep their place between the rows,
        since a checkpoint's cut lies behind a row."""
        for path in earlier:
            self._continue_after(path)

    def _continue_after(self, path: Path) -> None:
        """What a predecessor wrote is not written again."""
        with JournalReader.open(path) as reader:
            while records := reader.read():
                for record in records:
                    if record.kind is Kind.ROW:
                        assert record.step is not None  # our rows always name it
                        self.aligner.skip_to(record.step + 1)
                    elif record.kind is Kind.STATS:
                        feed = self._feeds[int(record.data.get(OF_RANK, 0))]
                        feed.sampled = max(feed.sampled, record.time)
                    elif record.kind is Kind.PREEMPTING:
                        self.was_preempting = True
                    elif record.kind is Kind.END:
                        self.ended = self.ended or record.data.get("exit_code") is not None
                    elif record.kind is not Kind.COMMIT:
                        self._passed_on.append((record.kind, record.time))

    def begin(self, feed: Feed) -> None:
        feed.rows = FeedRows(feed.number, self._layouts)

    # Taking rows ----------------------------------------------------------------------------------------

    def take(self, feed: Feed, frames: bytes | memoryview, skip: int = 0) -> bool:
        """Frames of a feed, of which `skip` bytes were taken before; False when their end does not verify."""
        assert feed.rows is not None
        found, end = feed.decoder.decode_rows(frames, skip)
        feed.received += end - skip
        rows, layouts, aligner, number = feed.rows, feed.layouts, self.aligner, feed.number
        for item in found:
            if type(item) is not tuple:
                assert isinstance(item, Record)
                self._take_record(feed, rows, item)
                continue
            schema, values, step, time, commits = item
            layout = layouts.get(schema.number)
            if layout is None:
                layout = layouts[schema.number] = self._layouts.of(schema)
            before = rows.step
            if (row := rows.add(layout, values, step, time)) is not None:
                assert before is not None
                aligner.add(before, row)
            if commits:
                self._close_row(rows)
            else:
                aligner.passed(number, step)
        self.keep_promise(feed)
        return end == len(frames)

    def keep_promise(self, feed: Feed) -> None:
        """What a rank says of the steps it has passed counts once everything it sent before is here."""
        offset, step = feed.promise
        if feed.received >= offset:
            self.aligner.passed(feed.number, step)

    def lose(self, feed: Feed) -> None:
        """Its rank died without END; what it had logged of an open step counts, as it does in a run of its own."""
        feed.lost_at = self.aligner.next_of(feed.number)
        if feed.rows is not None:
            self._close_row(feed.rows)
        self.aligner.leave(feed.number)

    def _take_record(self, feed: Feed, rows: FeedRows, record: Record) -> None:
        if record.kind is Kind.ROW:
            assert record.step is not None  # what `log` writes names it
            before = rows.step
            if (row := rows.add(None, record.data, record.step, record.time)) is not None:
                assert before is not None
                self.aligner.add(before, row)
            self.aligner.passed(feed.number, record.step)
            if record.commit:
                self._close_row(rows)
        elif record.kind is Kind.COMMIT:
            self._close_row(rows)
        elif record.kind is Kind.END:
            self._close_row(rows)
            feed.ended = record.data
            self.aligner.leave(feed.number)
        elif record.kind is Kind.DEFINE and "reduce" in record.data:
            rows.ops = rows.ops.after(record.data["reduce"])
        elif record.kind is Kind.STATS:
            if record.time > feed.sampled:  # else a predecessor has passed it on
                feed.sampled = record.time
                self._journal.append(Kind.STATS, {**record.data, OF_RANK: feed.number}, record.time)
        elif feed.number == 0:
            self._pass_on(record)

    def _close_row(self, rows: FeedRows) -> None:
        step = rows.step
        if (row := rows.close()) is not None:
            assert step is not None
            self.aligner.add(step, row)

    def _pass_on(self, record: Record) -> None:
        if record.kind is Kind.PREEMPTING:  # at once, also when a predecessor said it: saying it twice changes nothing
            self._preempting(record.time)
        elif not self._was_passed_on(record):
            self._held.append((self.aligner.next_of(0), record))

    def _was_passed_on(self, record: Record) -> bool:
        """By a predecessor. They passed on what rank 0 has, from its first record, in order and with its times."""
        name = (record.kind, record.time)
        if name not in self._passed_on:
            self._passed_on.clear()
            return False
        while self._passed_on.popleft() != name:
            pass  # a predecessor's own
        return True

    # Writing --------------------------------------------------------------------------------------------

    def write_complete_steps(self) -> None:
        append_row = self._journal.append_row
        for step, entries in self.aligner.complete():
            if self._held:
                self._write_held(step)
            append_row(reduced(entries), step=step, commit=True, time=entries[0].time)
            self.rows += 1
        self._write_held(self.aligner.frontier)

    def _write_held(self, step: int) -> None:
        """What may stand before the row of `step`."""
        while self._held and self._held[0][0] <= step:
            record = self._held.popleft()[1]
            self._journal.append(record.kind, record.data, record.time)


def exit_code_of(feeds: Iterable[Feed]) -> int:
    """Of a run whose rank 0 ended: the first failure of its ranks; a rank that was lost is one."""
    codes = [feed.ended.get("exit_code") if feed.ended else None for feed in feeds]
    return next((code for code in codes if code), EXIT_RETRYABLE if None in codes else 0)
