"""The shipper process: which journals there are, who asks for what, when it is time to leave."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import threading
from operator import itemgetter
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import IO

import msgspec

from wbdist.errors import Error, JournalCorruptError, UsageError
from wbdist.run.journal import JournalHeader, JournalReader, find_journals, writer_alive
from wbdist.run.journal_storage import is_local
from wbdist.run.local_history import LocalRun
from wbdist.run.shipper.control import (
    Reply,
    Request,
    call,
    decode_request,
    instance_lock_path,
    receive_line,
    send_reply,
    socket_path,
)
from wbdist.run.shipper.delivery import Delivery, Pace, State
from wbdist.run.shipper.lane import Lane
from wbdist.run.shipper.marks import mark, marked


class Limits(msgspec.Struct, frozen=True):
    """Seconds."""

    linger: float = 2.0
    """Between the last delivery and leaving: the next run of a script need not start a new shipper."""
    grace: float = 600.0
    """How long the shipper goes on trying when no writer lives and the server stays away."""
    scan: float = 5.0
    """Between looks for journals nobody told of."""
    goodbye: float = 2.0
    """For a last flush on SIGTERM."""


class Service:
    """One instance a root. `run` returns the process's exit code."""

    def __init__(self, root: Path, log: logging.Logger, pace: Pace | None = None, limits: Limits | None = None) -> None:
        self.root = root.resolve()
        self._log = log
        self._pace = pace or Pace()
        self._limits = limits or Limits()
        self._lanes: dict[str, Lane] = {}
        self._lane_of: dict[Path, Lane] = {}
        self._ignored: set[Path] = set()
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._terminated = False
        self._instance: IO[str] | None = None
        self._host = socket.gethostname()
        self._local = is_local(self.root)

    def run(self, first: Request | None = None) -> int:
        """Serves until there is nothing left to do. `first`: a request that came with the start."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_term)
        if not self._become_the_one(first):
            return 0
        listener = self._listen()
        if first is not None:
            self._answer(first)
        self._log.info("shipper %d of %s begins", os.getpid(), self.root)
        idle_since: float | None = None
        stuck_since: float | None = None
        next_scan = 0.0
        progressed = 0
        while not self._terminated:
            now = monotonic()
            if now >= next_scan:
                self._scan()
                next_scan = now + self._limits.scan
            self._mark_shipped()
            deliveries = self._deliveries()
            active = [delivery for delivery in deliveries if not delivery.finished or delivery.uploads.busy]
            progress = sum(delivery.uploads.progress for delivery in deliveries)
            idle_since = None if active else idle_since or now
            alone = bool(active) and not any(delivery.writer_lives for delivery in active)
            stuck_since = (stuck_since or now) if alone and progress == progressed else None
            progressed = progress
            if idle_since is not None and now - idle_since >= self._limits.linger:
                listener.close()
                socket_path(self.root).unlink(missing_ok=True)
                # Nobody can reach this shipper any more; whoever came in between is found here, or starts the next one.
                self._scan()
                if all(delivery.finished and not delivery.uploads.busy for delivery in self._deliveries()):
                    break
                listener, idle_since = self._listen(), None
            if stuck_since is not None and now - stuck_since >= self._limits.grace:
                self._log.warning(
                    "leaving: no writer lives and %d journals cannot be delivered; the next shipper, or `wbdist sync`, goes on",
                    len(active),
                )
                break
            self._wake.wait(0.2)
            self._wake.clear()
        listener.close()
        socket_path(self.root).unlink(missing_ok=True)
        for lane in list(self._lanes.values()):
            lane.stop(self._limits.goodbye if self._terminated else 0.5)
        self._mark_shipped()
        instance_lock_path(self.root).unlink(missing_ok=True)
        self._log.info("shipper %d of %s leaves", os.getpid(), self.root)
        return 0

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._terminated = True
        self._wake.set()

    def _become_the_one(self, first: Request | None) -> bool:
        """Takes the instance lock; False when another instance serves (it has then been told of `first`).

        An instance that is leaving holds the lock a little longer than it answers: worth a few tries.
        """
        path = instance_lock_path(self.root)
        deadline = monotonic() + 10.0
        while True:
            self._instance = open(path, "a", encoding="ascii")  # noqa: SIM115  (held for the process's life)
            try:
                fcntl.lockf(self._instance, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and path.stat().st_ino == os.fstat(self._instance.fileno()).st_ino:
                    return True
                continue  # an instance that was leaving has just removed the file we locked
            except BlockingIOError:
                self._instance.close()
            try:
                call(self.root, first or Request("ping"), 2.0)
            except OSError:
                if monotonic() > deadline:
                    self._log.warning(
                        "another shipper of %s holds the lock and does not answer; leaving it to that one", self.root
                    )
                    return False
                self._wake.wait(0.05)
            else:
                return False

    # Journals -----------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Finds journals that nobody told of: of jobs that ended without a shipper, or of runs a dead shipper watched.

        Older attempts are added first, and no request adds one meanwhile: a lane begins as soon as it is given a journal.
        """
        with self._lock:
            found = [(header.attempt, path, header) for path in find_journals(self.root) if (header := self._ours(path))]
            for _, path, header in sorted(found, key=itemgetter(0, 1)):
                try:
                    self._add(path, header.base_url, header.data_dir, None)
                except (UsageError, JournalCorruptError, OSError) as error:
                    self._ignored.add(path)
                    self._log.warning("%s is ignored: %s", path, error)

    def _ours(self, path: Path) -> JournalHeader | None:
        """Under the lock. The header of a journal that is new here and for this shipper."""
        if path in self._lane_of or path in self._ignored:
            return None
        try:
            with JournalReader.open(path) as reader:
                header = reader.header
        except (JournalCorruptError, OSError) as error:
            if not writer_alive(path):  # else it is just being written
                self._ignored.add(path)
                self._log.warning("%s is ignored: %s", path, error)
            return None
        # The lock tells whether the writer lives, whatever the host was called then (a pod restarted with its volume). Not
        # every network file system answers for another host's locks: there such a journal is that host's, or for `sync`.
        here = header.online and header.role == "run" and header.base_url
        if here and (header.host in {"", self._host} or self._local) and not marked(path):
            return header
        self._ignored.add(path)
        return None

    def _add(self, path: Path, base_url: str, data_dir: str, api_key: str | None) -> Lane:
        """Raises UsageError, JournalCorruptError or OSError."""
        with self._lock:
            lane = self._lane(base_url, data_dir, api_key)
            for each in (*self._segments_below(path), path):
                lane.add(each, api_key)
                self._lane_of[each] = lane
                self._ignored.discard(each)
            return lane

    def _segments_below(self, path: Path) -> list[Path]:
        """Offline journals of earlier attempts of the same run: what an online attempt is built upon goes where it goes."""
        header = _header(path)
        if header.attempt == 1 or path in self._lane_of:
            return []
        earlier = LocalRun(self.root, header.project, header.entity, header.run_id).journals
        return [
            journal.path
            for journal in earlier
            if journal.header.attempt < header.attempt
            and not journal.header.online
            and journal.path not in self._lane_of
            and not marked(journal.path)
        ]

    def _lane(self, base_url: str, data_dir: str, api_key: str | None) -> Lane:
        """The server's lane, with the key it was given last. An embedded server is one, whatever its port was at the time."""
        base_url = base_url.rstrip("/")
        with self._lock:
            lane = self._lanes.get(data_dir or base_url)
            if lane is None:
                lane = Lane(base_url, data_dir, lambda: _stored_key(base_url, data_dir, self._log), self._log, self._pace)
                self._lanes[data_dir or base_url] = lane
            if api_key:
                lane.use_key(api_key)
            return lane

    def _deliveries(self) -> list[Delivery]:
        with self._lock:
            return [delivery for lane in self._lanes.values() for delivery in lane.snapshot()]

    def _mark_shipped(self) -> None:
        for delivery in self._deliveries():
            ended = delivery.state in {State.DONE, State.FENCED} and not delivery.uploads.busy
            if ended and delivery.path not in self._ignored:
                try:
                    mark(delivery.path, delivery.state.value, delivery.remote.base_url)
                except OSError as error:
                    self._log.warning("%s cannot be marked (%s): it will be looked at again", delivery.path, error)
                self._ignored.add(delivery.path)

    # Requests -----------------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        path = socket_path(self.root)
        path.unlink(missing_ok=True)  # a dead instance's: the lock is ours
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(64)
        threading.Thread(target=self._accept, args=(listener,), name="control", daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed: the service is leaving
            threading.Thread(target=self._converse, args=(connection,), name="request", daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(10.0)
                line = receive_line(connection)
                if line:
                    connection.settimeout(None)
                    send_reply(connection, self._answer(decode_request(line)))
            except (OSError, msgspec.DecodeError) as error:
                self._log.warning("a request on the control socket failed: %s", error)

    def _answer(self, request: Request) -> Reply:
        try:
            if request.op == "ping":
                return Reply(ok=True, pid=os.getpid())
            if request.op == "watch":
                path = Path(request.journal)
                data_dir = _header(path).data_dir
                self._lane(request.base_url, data_dir, request.api_key)  # the key first: what the scan finds may need it
                self._scan()  # an older attempt of the same run must be known before this one begins
                self._add(path, request.base_url, data_dir, request.api_key)
                self._wake.set()
                return Reply(ok=True)
            if request.op == "flush":
                return self._flush(request)
            if request.op == "standing":
                return self._standing(Path(request.journal))
        except (JournalCorruptError, UsageError, OSError) as error:
            self._log.warning("%s %s: %s", request.op, request.journal, error)
            return Reply(error=str(error))
        return Reply(error=f"unknown request {request.op!r}; known are ping, watch, flush, standing")

    def _standing(self, path: Path) -> Reply:
        with self._lock:
            lane = self._lane_of.get(path)
        found = [] if lane is None else [one for one in lane.snapshot() if one.path == path]
        fenced = [one.error for one in found if one.fenced]
        return Reply(ok=True, error=fenced[0] if fenced else "", stopped=any(one.stopped for one in found))

    def _flush(self, request: Request) -> Reply:
        path = Path(request.journal)
        with self._lock:
            lane = self._lane_of.get(path)
        if lane is None:
            if marked(path):
                return Reply(acked=True)
            header = _header(path)
            base_url = request.base_url or header.base_url
            if not base_url:
                return Reply(error=f"{path} names no server, and nobody said where it goes")
            self._lane(base_url, header.data_dir, request.api_key)
            self._scan()
            lane = self._add(path, base_url, header.data_dir, request.api_key)
        elif request.api_key:
            lane.add(path, request.api_key)  # begins again what was refused for want of the key
        acked, error = lane.flush(path, request.timeout, request.priority, request.files)
        return Reply(acked=acked, error=error)


def _header(path: Path) -> JournalHeader:
    with JournalReader.open(path) as reader:
        return reader.header


def _stored_key(base_url: str, data_dir: str, log: logging.Logger) -> str | None:
    """The key for a server that nobody told us: of the environment, of `wbdist login`, or the embedded server's own."""
    from wbdist import settings
    from wbdist.run import backend, credentials

    try:
        if key := os.environ.get("WBDIST_API_KEY") or os.environ.get("WANDB_API_KEY"):
            return key
        home = Path(data_dir) if data_dir else settings.default_data_dir()
        embedded = data_dir or backend.last_url(home) == base_url
        return (credentials.admin_key(home) if embedded else None) or credentials.from_netrc(base_url)
    except Error as error:
        log.warning("no stored key for %s: %s", base_url, error)  # the server's 401 is then the clear message
        return None
