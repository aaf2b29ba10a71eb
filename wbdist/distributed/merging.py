"""Strategy rank0: all ranks' feeds in, the one run's journal out.

No connections, no processes: the aggregator feeds it what arrives, a replay (`distributed/replay.py`) what lies on disk, and
both write the same rows. It holds no state that is not in journals: a successor takes the feeds from their first byte, and
leaves out what its predecessors' journals hold. A journal is never opened again for writing, so a successor is a new writer of
the same attempt, `rank0.1` after `rank0`, with a sequence of its own.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from wbdist.distributed.alignment import StepAligner
from wbdist.distributed.intake import FeedRow, FeedRows, Layout, Layouts, reduced
from wbdist.errors import EXIT_RETRYABLE
from wbdist.run.journal import FrameDecoder, JournalReader, JournalWriter, Kind, Record
from wbdist.run.journal_format import STEP_AT

OF_RANK = "_rank"
"""Key of what another rank than 0 said, and of any sample of system metrics, in the run's journal: whose it is."""
OF_ALL = frozenset({Kind.CONSOLE, Kind.ALERT, Kind.FILE})
"""What is passed on of every rank, of files those that rows show; of rank 0 it is everything that makes no rows."""
HOLD = 2.0
"""Seconds after which another rank's line no longer waits for the end of the step that it was printed in."""


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
        self.here = True
        """Its files can be read on this machine."""
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
        self,
        feeds: Sequence[Feed],
        journal: JournalWriter,
        earlier: Sequence[Path],
        preempting: Callable[[float], None],
        hold: float = HOLD,
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
        self._hold = hold
        self._layouts = Layouts()
        self._passed_on: list[deque[tuple[Kind, float]]] = [deque() for _ in feeds]
        """By rank the records of predecessors that its feed may bring again: what they passed on, of rank 0 and a few own."""
        self._held: list[tuple[int, int, int, float, Record]] = []
        """Heap of records that wait until every step below theirs is written: (step, rank, number, when it came, record). They
        keep their place between the rows, since a checkpoint's cut lies behind a row; those of one step by rank."""
        self._numbers = itertools.count()
        self._alerted: dict[str, float] = {}
        """Title -> time of the last alert that was passed on."""
        self._phase = -1
        """Number of the last mark of the timeline that the run has."""
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
                    elif record.kind is Kind.PHASE:
                        self._phase = max(self._phase, record.data["n"])
                    elif record.kind is Kind.PREEMPTING:
                        self.was_preempting = True
                    elif record.kind is Kind.END:
                        self.ended = self.ended or record.data.get("exit_code") is not None
                    elif record.kind is not Kind.COMMIT:
                        self._passed_on[int(record.data.get(OF_RANK, 0))].append((record.kind, record.time))
                        if record.kind is Kind.ALERT:
                            self._alerted[record.data["title"]] = record.time

    def begin(self, feed: Feed) -> None:
        feed.rows = FeedRows(feed.number, self._layouts)

    # Taking rows ----------------------------------------------------------------------------------------

    def take(self, feed: Feed, frames: bytes | memoryview, skip: int = 0) -> bool:
        """Frames of a feed, of which `skip` bytes were taken before; False when their end does not verify."""
        assert feed.rows is not None
        found, end = feed.decoder.decode_rows(frames, skip)
        feed.received += end - skip
        rows, layouts, aligner = feed.rows, feed.layouts, self.aligner
        for item in found:
            if isinstance(item, Record):
                self._take_record(feed, rows, item)
                continue
            layout = layouts.get(item.schema.number)
            if layout is None:
                layout = layouts[item.schema.number] = self._layouts.of(item.schema)
            rows.add_packed(layout, item.rows, aligner.put)
            aligner.passed(feed.number, item.rows[-1][STEP_AT] + (rows.step is None))
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
        elif record.kind is Kind.PHASE:
            if record.data["n"] > self._phase:
                self._phase = record.data["n"]
                self._journal.append(Kind.PHASE, record.data, record.time)  # in no row's place: no watermark counts it
        elif feed.number == 0 or record.kind in OF_ALL:
            self._pass_on(feed, record)

    def _close_row(self, rows: FeedRows) -> None:
        step = rows.step
        if (row := rows.close()) is not None:
            assert step is not None
            self.aligner.add(step, row)

    def _pass_on(self, feed: Feed, record: Record) -> None:
        if record.kind is Kind.PREEMPTING:  # at once, also when a predecessor said it: saying it twice changes nothing
            self._preempting(record.time)
            return
        if feed.number and record.kind is Kind.FILE and not (feed.here and str(record.data.get("name")).startswith("media/")):
            return
        if not self._was_passed_on(feed.number, record):
            entry = (self.aligner.next_of(feed.number), feed.number, next(self._numbers), monotonic(), record)
            heapq.heappush(self._held, entry)

    def _was_passed_on(self, rank: int, record: Record) -> bool:
        """By a predecessor. They passed on what a rank has, from its first record, in order and with its times."""
        name, passed_on = (record.kind, record.time), self._passed_on[rank]
        if name not in passed_on:
            return False
        while passed_on.popleft() != name:
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
        if self._held:
            self._write_held_now()

    def _write_held(self, step: int) -> None:
        """What stands before the row of `step`, of which every rank has said all."""
        while self._held and self._held[0][0] <= step:
            self._write_other(heapq.heappop(self._held))

    def _write_held_now(self) -> None:
        """The same of steps without a row. Of the first open one what rank 0 said, and others' words when the step takes long:
        somebody may be looking for what hangs."""
        held, frontier = self._held, self.aligner.frontier
        while held and held[0][0] <= frontier:
            step, rank, _, came, _ = held[0]
            if step == frontier and rank and came + self._hold > monotonic():
                return
            self._write_other(heapq.heappop(held))

    def _write_other(self, entry: tuple[int, int, int, float, Record]) -> None:
        _, rank, _, _, record = entry
        data = record.data
        if record.kind is Kind.ALERT:
            # The same line on every rank is one alert.
            title = data["title"]
            if rank and record.time < self._alerted.get(title, -math.inf) + data["wait"]:
                return
            self._alerted[title] = record.time
            data = {**data, "text": f"[rank{rank}] {data['text']}"} if rank else data
        self._journal.append(record.kind, {**data, OF_RANK: rank} if rank else data, record.time)


def exit_code_of(feeds: Iterable[Feed]) -> int:
    """Of a run whose rank 0 ended: the first failure of its ranks; a rank that was lost is one."""
    codes = [feed.ended.get("exit_code") if feed.ended else None for feed in feeds]
    return next((code for code in codes if code), EXIT_RETRYABLE if None in codes else 0)
