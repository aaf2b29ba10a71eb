"""Strategy rank0: the process beside rank 0 that makes one run of all ranks' feeds.

It takes each rank's journal in order, aligns the rows by step, reduces the steps that all ranks have passed, and writes the
one run's journal (`distributed/merging.py`); the shipper of that journal does the rest.

A thread a connection reads, one thread does all the work: a rank that is killed, or stopped in the middle of a message,
holds up its own reader only. Rank 0 is dead when it is our parent no more, other local ranks when the lock of their journal
is free (a socket may be held open by forked data workers); what they had not sent is read from their journal.

Started by rank 0 with a `Plan` on stdin; answers on stdout with one `Started` in JSON. Imports no torch.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import msgspec

from wbdist.distributed import channel, replay
from wbdist.distributed.channel import Address, Drained, Hello, Message
from wbdist.distributed.coordination import name_ranks
from wbdist.distributed.cut import PositionCursor
from wbdist.distributed.lateness import LatePolicy
from wbdist.distributed.merging import Feed, Merger, exit_code_of
from wbdist.errors import EXIT_RETRYABLE, Error, JournalCorruptError
from wbdist.run.handle import Run
from wbdist.run.journal import JournalReader, JournalWriter, writer_alive
from wbdist.run.lifecycle import RunSpec, open_run
from wbdist.run.shipper import marks

TICK = 0.25
"""Seconds between two looks for dead ranks."""
LINGER = 10.0
"""Seconds that the other ranks have, after rank 0 ended or was lost, to end too; and a remote rank to connect again."""
HANDSHAKE = 5.0
STRANGERS = 2.0
"""How long it stays after rank 0 was lost, when nobody else is left but ranks that never came: a live one, which tries every
moment, would have come; a launcher that takes the job down must not be outlived for LINGER."""
FAREWELL = 2.0
"""Seconds for the feeders to hang up after FINISHED."""
INBOX = 64
"""Messages read ahead of the work; beyond, the sockets fill and the feeders' cursors lag."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 tells its aggregator."""

    spec: RunSpec
    world_size: int
    parent: int
    """Rank 0's pid."""
    key: bytes
    host: str
    """To listen on."""
    late: LatePolicy | None = None
    earlier: tuple[str, ...] = ()
    """Journals of this attempt's earlier aggregators, oldest first."""


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer: where it listens, or why it cannot."""

    address: Address = ("", 0)
    journal: str = ""
    url: str | None = None
    name: str | None = None
    entity: str = ""
    project: str = ""
    error: str = ""
    error_class: str = ""


class Rank(Feed):
    """One rank as the aggregator knows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.connection: Connection | None = None
        self.disconnected = 0.0
        self.local: Path | None = None
        """Its journal, when we can read it."""


class Aggregator:
    """The work; `serve` runs it to its end."""

    def __init__(self, plan: Plan, run: Run, listener: Listener) -> None:
        journal = run.journal  # rows carry rank 0's times; `Run.log` would stamp its own
        assert isinstance(journal, JournalWriter)
        self._run = run
        self._journal: JournalWriter = journal
        self._listener = listener
        self._key = plan.key
        self._ranks = [Rank(number) for number in range(plan.world_size)]
        earlier = [Path(path) for path in plan.earlier]
        self._merger = Merger(self._ranks, journal, earlier, self._mark_preempting)
        self._aligner = self._merger.aligner
        self._late = plan.late
        self._quorum_at: deque[tuple[float, int]] = deque()
        """When the quorum had passed which step, of steps that are still waited for."""
        self._late_told = 0
        self._cursor = PositionCursor([*earlier, journal.path])
        self._inbox: queue.Queue[tuple[Connection, bytes | None]] = queue.Queue(INBOX)
        self._drains: dict[int, Connection] = {}
        self._rank0_gone_at: float | None = None
        self._machine = channel.this_machine()
        self._parent = plan.parent

    def _mark_preempting(self, time: float) -> None:
        del time  # it is said now
        self._run.mark_preempting()

    # Listening ------------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Until the run has ended; the exit code. Without END in the journal when rank 0 was lost."""
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        looked = time.monotonic()
        while True:
            self._take_messages()
            now = time.monotonic()
            if self._late is not None:
                self._wait_no_longer(self._late, now)
            self._merger.write_complete_steps()
            if now - looked >= TICK:
                looked = now
                self._look_for_dead(now)
                self._tell_late()
            self._answer_drains()
            if all(rank.gone for rank in self._ranks) or (
                self._rank0_gone_at is not None and now - self._rank0_gone_at > self._patience()
            ):
                return self._end()

    def _patience(self) -> float:
        """Seconds to stay after rank 0 is gone."""
        strangers = all(rank.gone or rank.rows is None for rank in self._ranks)
        return STRANGERS if strangers and self._ranks[0].lost_at is not None else LINGER

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # one client's fault, such as a reset before it was accepted; or no descriptor is left
                time.sleep(TICK / 10)
                continue
            threading.Thread(target=self._read, args=(connection,), name="read", daemon=True).start()

    def _read(self, connection: Connection) -> None:
        """One connection: prove the key both ways, then its messages, one at a time."""
        from multiprocessing.connection import answer_challenge, deliver_challenge

        try:
            channel.patience(connection, HANDSHAKE)
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            channel.patience(connection, 0)
            channel.without_delay(connection)
            while True:
                self._inbox.put((connection, connection.recv_bytes()))
        except channel.BROKEN:
            self._inbox.put((connection, None))

    def _take_messages(self) -> None:
        try:
            connection, message = self._inbox.get(timeout=TICK)
            for _ in range(INBOX):
                self._handle(connection, message)
                connection, message = self._inbox.get_nowait()
            self._handle(connection, message)
        except queue.Empty:
            return

    def _handle(self, connection: Connection, message: bytes | None) -> None:
        rank = next((rank for rank in self._ranks if rank.connection is connection), None)
        if message is None:
            connection.close()
            if rank is not None:
                rank.connection = None
                rank.disconnected = time.monotonic()
            return
        kind, payload = channel.split(message)
        if kind is Message.HELLO:
            self._greet(connection, msgspec.msgpack.decode(payload, type=Hello))
        elif rank is None:
            return  # replaced by a later connection of its rank
        elif kind is Message.FRAMES:
            offset, frames = channel.split_number(payload)
            self._take_frames(rank, offset, frames)
        elif kind is Message.PASSED:
            step, rest = channel.split_number(payload)
            rank.promise = (channel.split_number(rest)[0], step)
            self._merger.keep_promise(rank)
        elif kind is Message.DRAIN:
            self._drains[channel.split_number(payload)[0]] = connection

    def _greet(self, connection: Connection, hello: Hello) -> None:
        rank = self._ranks[hello.rank]
        rank.connection = connection
        if rank.rows is None:
            self._merger.begin(rank)
            if hello.machine == self._machine and Path(hello.path).exists():
                rank.local = Path(hello.path)
            rank.here = rank.local is not None
        self._tell(rank, Message.NEXT, rank.received)
        if rank.ended is not None:
            self._tell(rank, Message.RECEIVED)

    def _tell(self, rank: Rank, kind: Message, number: int = 0, payload: bytes = b"") -> None:
        """Best effort: a broken connection is noticed by its reader."""
        if rank.connection is None:
            return
        try:
            channel.send_numbered(rank.connection, kind, number, payload)
        except channel.BROKEN:
            return

    # Taking rows ----------------------------------------------------------------------------------------

    def _take_frames(self, rank: Rank, offset: int, frames: bytes | memoryview) -> None:
        skip = rank.received - offset
        if skip < 0:
            self._tell(rank, Message.NEXT, rank.received)
            return
        if skip >= len(frames) or rank.rows is None or rank.gone:
            return
        if not self._merger.take(rank, frames, skip):  # not a boundary of our frames: let the feeder slice anew
            self._tell(rank, Message.NEXT, rank.received)
        if rank.ended is not None:
            self._tell(rank, Message.RECEIVED)
            self._left(rank)

    def _wait_no_longer(self, policy: LatePolicy, now: float) -> None:
        """Lets go of steps that the quorum passed long enough ago."""
        waiting = self._quorum_at
        passed = self._aligner.passed_by(policy.ranks)
        if passed > (waiting[-1][1] if waiting else self._aligner.frontier):
            waiting.append((now, passed))
        while waiting and now - waiting[0][0] >= policy.patience:
            self._aligner.close_below(waiting.popleft()[1])

    def _tell_late(self) -> None:
        late = self._aligner.late
        if sum(late) > max(2 * self._late_told, 0):  # at once, then when it has doubled
            self._late_told = sum(late)
            by = ", ".join(f"{count} of rank {rank}" for rank, count in enumerate(late) if count)
            self._run.settings.say(
                f"run {self._run.id}: rows that came too late for their step, and are in their ranks' journals only: {by}",
                warning=True,
            )

    # Ranks that leave -----------------------------------------------------------------------------------

    def _left(self, rank: Rank) -> None:
        if rank.number == 0:
            self._rank0_gone_at = time.monotonic()

    def _look_for_dead(self, now: float) -> None:
        for rank in self._ranks:
            if rank.gone:
                continue
            if rank.number == 0:
                dead = os.getppid() != self._parent
            elif rank.rows is None:
                continue
            elif rank.local is not None:
                dead = not writer_alive(rank.local)
            else:
                dead = rank.connection is None and now - rank.disconnected > LINGER
            if dead:
                self._bury(rank)

    def _bury(self, rank: Rank) -> None:
        """The rest of a dead rank's journal; ended when END is in there, else lost."""
        if rank.local is not None:
            try:
                with JournalReader.open(rank.local) as reader:
                    while True:
                        frames, _ = reader.frames(reader.first + rank.received)
                        if not frames:
                            break
                        self._take_frames(rank, rank.received, frames)
            except (OSError, JournalCorruptError) as error:
                self._run.settings.say(f"rank {rank.number}: the rest of its journal cannot be read: {error}", warning=True)
        if not rank.gone:
            self._run.settings.say(f"rank {rank.number} was lost; the run goes on with the others", warning=True)
            self._merger.lose(rank)
            self._left(rank)

    def _answer_drains(self) -> None:
        for step, connection in list(self._drains.items()):
            lost = [rank.number for rank in self._ranks if rank.lost_at is not None and rank.lost_at <= step]
            if lost:
                answer = Drained(step, error=f"{name_ranks(lost)} died before step {step} was complete on all ranks")
            elif self._aligner.frontier > step:
                self._journal.sync()
                position = self._cursor.position(step)
                cut = tuple((str(path), frame) for path, frame in self._cursor.cut())
                answer = Drained(step, position=position, cut=cut)
            else:
                continue
            del self._drains[step]
            try:
                channel.send(connection, Message.DRAINED, channel.encode(answer))
            except channel.BROKEN:
                continue  # asked again over the next connection

    # The end --------------------------------------------------------------------------------------------

    def _end(self) -> int:
        for rank in self._ranks:
            if not rank.gone:
                self._bury(rank)
        self._merger.write_complete_steps()
        self._answer_drains()
        self._tell_late()
        first = self._ranks[0]
        if first.ended is None:
            # No END: the shipper sees the lock freed without one, and reports the run lost.
            self._journal.sync()
            return EXIT_RETRYABLE
        self._run.finish(exit_code_of(self._ranks), cause=str(first.ended.get("cause", "exit")))
        for rank in self._ranks:
            if rank.local is not None:
                with suppress(OSError):  # it is looked at once more, then
                    marks.settle(rank.local)
            self._tell(rank, Message.FINISHED)
        deadline = time.monotonic() + FAREWELL
        while any(rank.connection is not None for rank in self._ranks) and time.monotonic() < deadline:
            self._take_messages()
        return 0


def main() -> None:
    """Entry of the process. Ends by itself: with the run, or after rank 0 is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # A warning of preemption reaches every process of a job step; the ranks still have rows to send after it.
        signal.signal(number, signal.SIG_IGN)
    # The readers need the interpreter for microseconds at a time; at the usual 5 ms a turn they would starve the work.
    sys.setswitchinterval(0.0005)
    # Rows come and go in tens of thousands, without cycles.
    gc.set_threshold(100_000, 20, 50)
    plan = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Plan)
    try:
        run = open_run(plan.spec)
        listener = Listener((plan.host, 0), backlog=plan.world_size)
        aggregator = Aggregator(plan, run, listener)
    except Error as error:
        _answer(Started(error=str(error), error_class=type(error).__name__))
        raise SystemExit(error.exit_code) from None
    port = listener.address[1]
    assert isinstance(port, int)
    try:
        _answer(
            Started(
                address=(plan.host, port),
                journal=str(run.journal_path),
                url=run.url,
                name=run.name,
                entity=run.entity,
                project=run.project,
            )
        )
    except BrokenPipeError:  # rank 0 was gone before we came up, and nobody else knows of us: the run is lost, not failed
        os._exit(EXIT_RETRYABLE)
    if run.attempt > 1:
        replay.in_background(run)
    try:
        code = aggregator.serve()
    except Error as error:
        plan.spec.settings.say(f"the aggregator of run {plan.spec.run_id} ends: {error}", warning=True)
        code = error.exit_code
    # Not through atexit, which would finish a run that was lost.
    os._exit(code)


def _answer(started: Started) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(started))
    sys.stdout.flush()
    # The reader waits for the end of the pipe.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    main()
