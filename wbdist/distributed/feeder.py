"""Strategy rank0, on every rank: this rank's journal, forwarded to the aggregator.

One light thread a rank slices raw frames off the journal file and sends them. Nothing is decoded or encoded,
nothing is queued: the journal is the queue. When the aggregator is slow or away, the cursor lags and `log` does not notice;
when it is back, or a new one came, the cursor goes to where that one wants to go on.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from wbdist.core.position import RunPosition
from wbdist.distributed import channel
from wbdist.distributed.channel import Drained, Hello, Meeting, Message
from wbdist.errors import DeadlineError, EnvironmentFault, PeerLostError
from wbdist.run.journal import JournalReader

log = logging.getLogger("wbdist.distributed")

BUSY = 0.02
"""Seconds between two looks at the journal while rows come in."""
IDLE = 0.1
"""The same after a second without rows."""
SMALL, LARGE = 1 << 13, 1 << 19
"""Bytes: of fewer than SMALL the rest waits for the next look; a cursor lags by more than LARGE."""
HANDSHAKE = 20.0
"""Seconds for the aggregator to answer HELLO; it may be reading a long journal of its predecessor."""
RETRY = 0.1


class Feeder:
    """Forwards one journal; any thread may call it.

    `next_meeting(generation)` is called on the feeder's thread when the aggregator of the generation before is lost, again
    and again until it returns a Meeting; it raises EnvironmentFault to give up.
    """

    def __init__(
        self,
        journal: Path,
        rank: int,
        meeting: Meeting | None,
        next_meeting: Callable[[int], Meeting | None],
        written: Callable[[], int],
    ) -> None:
        """`meeting` None: there is no aggregator yet; `next_meeting` is asked for the first one, too. `written`: where the
        journal's last whole frame ends, as its writer in this process knows it."""
        self.rank = rank
        self.passed = 0
        """The rank adds nothing below this step. Set by the rank after the rows below are journalled; sent after them."""
        self._reader = JournalReader.open(journal)
        self._meeting = meeting
        self._next_meeting = next_meeting
        self._written = written
        self._lock = threading.Lock()
        self._drains: dict[int, _Drain] = {}
        self._fault = ""
        self._abandoned = False
        self._ready = threading.Event()
        self._done = threading.Event()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._offset = self._reader.first
        self._thread = threading.Thread(target=self._work, name="wbdist-feeder", daemon=True)
        self._thread.start()
        if meeting is not None:
            # Known from the start: whose journal the aggregator has never heard of, nobody can miss when it dies.
            self._ready.wait(HANDSHAKE)

    def drain(self, step: int, timeout: float) -> tuple[RunPosition, list[tuple[Path, int]]]:
        """Rank 0, any thread: the run's position after `step`, once all ranks' rows up to it are fsynced in the run's journal;
        and the run's journals up to there, each with its last frame.

        Blocks at most `timeout` seconds. Raises PeerLostError naming lost ranks, DeadlineError, EnvironmentFault when the
        aggregator cannot be had.
        """
        with self._lock:
            if self._fault:
                raise EnvironmentFault(self._fault)
            asked = self._drains.setdefault(step, _Drain(step))
        self._wake()
        answered = asked.event.wait(timeout)
        with self._lock:
            self._drains.pop(step, None)
        if self._fault:
            raise EnvironmentFault(self._fault)
        if not answered or asked.answer is None:
            raise DeadlineError(
                f"the aggregator did not have all ranks' rows up to step {step} within {timeout:.0f} s; a rank may hang, "
                "or did not call drain()"
            )
        if asked.answer.position is None:
            raise PeerLostError(asked.answer.error)
        return asked.answer.position, [(Path(path), frame) for path, frame in asked.answer.cut]

    def complete(self, timeout: float) -> bool:
        """After the journal's END: True when the aggregator has all of it (rank 0: when the run has ended). Blocks at most
        `timeout` seconds; afterwards nothing more is sent."""
        self._wake()
        done = self._done.wait(timeout)
        self._abandoned = True
        self._wake()
        self._thread.join(RETRY * 5)
        with self._lock:
            if not self._thread.is_alive() and self._wake_write >= 0:
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_write = -1
                self._reader.close()
        return done and not self._fault

    def _wake(self) -> None:
        with self._lock, suppress(BlockingIOError):  # full of wake-ups already
            if self._wake_write >= 0:
                os.write(self._wake_write, b"!")

    # The thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._run()
        except EnvironmentFault as error:
            log.error("rank %d: %s", self.rank, error)
            self._give_up(str(error))
        except Exception as error:  # whoever waits must learn of it, whatever it is
            if self._abandoned:
                return
            log.exception("rank %d: feeding the aggregator has failed", self.rank)
            self._give_up(
                f"feeding the aggregator has failed: {type(error).__name__}: {error}. Rows are kept on this rank's disk."
            )

    def _give_up(self, why: str) -> None:
        with self._lock:
            self._fault = why
            for asked in self._drains.values():
                asked.event.set()
        self._ready.set()
        self._done.set()

    def _run(self) -> None:
        while self._meeting is None:
            if not self._find_next():
                return
        while not self._abandoned:
            try:
                connection = channel.dial(self._meeting)
            except channel.BROKEN as error:
                log.info("rank %d: no connection to the aggregator (%s)", self.rank, error)
            else:
                with connection:
                    try:
                        if self._feed(connection):
                            self._done.set()
                            return
                    except channel.BROKEN as error:
                        log.info("rank %d: the connection to the aggregator broke (%s)", self.rank, error)
            if not self._find_next():
                return

    def _find_next(self) -> bool:
        """A meeting with the next aggregator; False when there will be none."""
        while not self._abandoned:
            found = self._next_meeting(0 if self._meeting is None else self._meeting.generation + 1)
            if found is not None:
                self._meeting = found
                return True
            time.sleep(RETRY)
        return False

    def _feed(self, connection: Connection) -> bool:
        """Until there is nothing more to do (True), or the connection breaks (raises)."""
        reader = self._reader
        hello = Hello(self.rank, reader.header, str(reader.path), channel.this_machine())
        channel.send(connection, Message.HELLO, channel.encode(hello))
        if not connection.poll(HANDSHAKE):
            raise TimeoutError(f"no answer within {HANDSHAKE:.0f} s")
        self._hear(connection)
        self._ready.set()
        told = -1
        last_row = time.monotonic()
        for asked in self._drains.values():
            asked.sent = False
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ, True)
            selector.register(self._wake_read, selectors.EVENT_READ, False)
            while not self._abandoned:
                passed = self.passed  # before looking at the journal: rows below it are in there
                if self._send_frames(connection):
                    last_row = time.monotonic()
                if passed > told:
                    channel.send_numbered(connection, Message.PASSED, passed, channel.number(self._offset - reader.first))
                    told = passed
                self._ask(connection)
                for key, _ in selector.select(BUSY if time.monotonic() - last_row < 1.0 else IDLE):
                    if not key.data:
                        os.read(self._wake_read, 4096)
                    elif self._hear(connection):
                        return True
        return False

    def _send_frames(self, connection: Connection) -> int:
        """Everything there is. A cursor that keeps up looks at nothing on the way: the writer says where its frames end,
        and the aggregator verifies them. A cursor that lags slices whole frames."""
        sent = 0
        while not self._abandoned:
            end = self._written()
            if end - self._offset > LARGE:
                frames, end = self._reader.frames(self._offset, LARGE)
            else:
                frames = self._reader.raw(self._offset, end)
            if not frames:
                break
            channel.send_numbered(connection, Message.FRAMES, self._offset - self._reader.first, frames)
            self._offset += len(frames)
            sent += len(frames)
            if len(frames) < SMALL:
                break
        return sent

    def _ask(self, connection: Connection) -> None:
        with self._lock:
            asking = [asked for asked in self._drains.values() if not asked.sent]
        for asked in asking:
            channel.send_numbered(connection, Message.DRAIN, asked.step)
            asked.sent = True

    def _hear(self, connection: Connection) -> bool:
        """One message; True when it was the last one."""
        kind, payload = channel.split(connection.recv_bytes())
        if kind is Message.NEXT:
            self._offset = self._reader.first + channel.split_number(payload)[0]
        elif kind is Message.DRAINED:
            drained = msgspec.msgpack.decode(payload, type=Drained)
            with self._lock:
                asked = self._drains.get(drained.step)
            if asked is not None:
                asked.answer = drained
                asked.event.set()
        elif kind is Message.RECEIVED:
            return self.rank != 0
        return kind is Message.FINISHED


class _Drain:
    def __init__(self, step: int) -> None:
        self.step = step
        self.event = threading.Event()
        self.answer: Drained | None = None
        self.sent = False
