"""The thread that keeps a pool: starts workers, hands out work, takes results, notices deaths.

    starting --READY--> idle --chunk--> busy --its results--> idle --LEAVE--> leaving --> gone
    any --killed--> gone: the call it was at is lost and said so, the calls that it has behind that go to another worker

A busy worker has one more chunk ahead, which it begins while its last result is on the way. When nothing waits any more, an
idle worker gets a chunk that another has ahead, unless that one has claimed it by now.

Each worker has a socket of its own, which is never waited for: no lock, no queue is shared, so a worker that is killed at any
instruction takes along nothing but its own task. (In multiprocessing.Pool it may take along the lock of a queue, for good.)
All processes are started by this thread, since the kernel ties a child to the thread that made it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import signal
import socket
import threading
import time
import weakref
from time import monotonic
from typing import Any

import msgspec
from multiprocess.connection import Connection as PackageConnection

from wbdist.distributed.pool_jobs import Job
from wbdist.distributed.pool_runs import Runs
from wbdist.distributed.pool_worker import HEAD, PLACE, Call, Failure, Message, Result, Start, Work, message, run_worker, unpack
from wbdist.distributed.processes import session_hidden
from wbdist.errors import EXIT_FAILED_FOR_GOOD, EnvironmentFault, Error, MainGuardError, UsageError
from wbdist.run.main_guard import SPAWNED

STILLBORN = 3
"""Workers in a row that die before they are ready, with no result meanwhile; then there is no use in starting more."""
TERMINATE = 5.0
"""Seconds between SIGTERM and SIGKILL to a worker that is to be ended; idle ones first have their runs' `finish_timeout`."""
LOADING = 30.0
"""Seconds for the other workers that load an unguarded script to end of themselves: one of them tells the user why."""
PAUSE = 0.001
"""Seconds that a chunk's results may gather before the next look, while all workers have work: a result costs little then, and
the thread takes less from workers on the same cores."""
_RECEIVE = 1 << 20


class WorkerLostError(EnvironmentFault):
    """The process that ran the task died: killed, or by an exit past Python. `task` is the number of the task, `pid` and
    `exitcode` (negative for a signal) are the process's. The task is not run again: it may have done its work."""

    def __init__(self, message: str, task: int | None = None, pid: int = 0, exitcode: int | None = None) -> None:
        super().__init__(message)
        self.task = task
        self.pid = pid
        self.exitcode = exitcode


class TaskFailedError(Error):
    """A task ended by an exception that cannot be brought here as it is; the message is its text and traceback."""


class RemoteTraceback(Exception):  # noqa: N818  (multiprocessing's name for it)
    """The cause of an exception that a task raised: its traceback in the worker."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tb = text

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


class Chunk(msgspec.Struct):
    job: Job
    calls: list[Call]


_pipes: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Our ends. A forked process must not hold them: a worker would not see that its pool is gone."""


class _Worker:
    def __init__(self, number: int, process: Any, channel: socket.socket, place: int, claims: int) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.place = place
        self.pidfd = os.pidfd_open(process.pid)
        self.ready = False
        self.leaving = False
        self.claims = claims
        self.queue: collections.deque[Chunk] = collections.deque()
        """What it is at, and what it has ahead."""
        self.reported = 0
        """Calls of the first of these whose results are here."""
        self.job = -1
        """Whose function it has, or will have."""
        self.skipping = False
        """A chunk was taken back that it has not come to yet."""
        self.chunks = 0
        """Done."""
        self.out = bytearray()
        self.received = bytearray()
        self.silent = False
        """It has closed its end, or died."""
        self.deadline = float("inf")
        """When it is killed."""
        self.killed = False

    @property
    def name(self) -> str:
        return f"worker {self.number} (pid {self.process.pid})"


class Keeper(threading.Thread):
    """Serves one pool until all its workers are gone."""

    def __init__(  # noqa: PLR0917  (all of a pool)
        self, context: Any, size: int, runs: Runs, initializer: bytes | None, max_chunks: int | None, finish_timeout: float
    ) -> None:
        super().__init__(name="wbdist-pool", daemon=True)
        self.changed = threading.Condition()
        """Guards what follows, and tells its changes."""
        self.pending: collections.deque[Chunk] = collections.deque()
        self.jobs: dict[int, Job] = {}
        self.closing = False
        self.terminating = False
        self.broken: BaseException | None = None
        self.workers: list[_Worker] = []
        self._context = context
        self._size = size
        self._runs = runs
        self._initializer = initializer
        self._max_chunks = max_chunks
        self._finish_timeout = finish_timeout
        self._stillborn = 0
        self._midway = False
        """Nothing came but results of chunks that are not done: nothing has to be done now."""
        self._born = 0
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, None)

    # From other threads -----------------------------------------------------------------------------------

    def submit(self, chunks: list[Chunk]) -> None:
        """Raises what broke the pool."""
        with self.changed:
            if self.broken is not None:
                raise self.broken
            for chunk in chunks:
                self.jobs[chunk.job.number] = chunk.job
                chunk.job.waiting += 1
                self.pending.append(chunk)
        self.wake()

    def register(self, job: Job) -> None:
        """The job's calls come later, one by one. Raises what broke the pool."""
        with self.changed:
            if self.broken is not None:
                raise self.broken
            self.jobs[job.number] = job

    def submit_when(self, job: Job, calls: list[Call], ahead: int) -> bool:
        """Blocks while `ahead` chunks of the job wait for a worker; False when no more work is done."""
        with self.changed:
            while job.waiting >= ahead and not self.terminating and self.broken is None:
                self.changed.wait()
            if self.terminating or self.broken is not None:
                return False
            job.waiting += 1
            self.pending.append(Chunk(job, calls))
        self.wake()
        return True

    def forget_settled(self, job: Job) -> None:
        if job.settled:
            with self.changed:
                self.jobs.pop(job.number, None)
            self.wake()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is awake; closed: it has ended
            os.write(self._waker, b"\0")

    # The thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # noqa: BLE001  (no descriptors left, and the like: raised by everything that is asked)
            self._break(error)
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()
        finally:
            with self.changed:
                self.broken = self.broken or UsageError("the pool has ended")
                self._fail_jobs()
            self._selector.close()
            os.close(self._wake)
            os.close(self._waker)

    def _turn(self) -> bool:
        """One look at everything; False when there is nothing left to keep."""
        with self.changed:
            if self.terminating or self.broken is not None:
                self._fail_jobs()
            done = not self.pending and not any(worker.queue for worker in self.workers)
            ending = self.terminating or self.broken is not None or (self.closing and done and not self.jobs)
            wanted = 0 if ending else self._size
        if ending:
            self._end_workers()
            if not self.workers:
                return False
        while sum(not worker.leaving for worker in self.workers) < wanted and self.broken is None:
            self._start()
        self._hand_out()
        if self._midway:
            time.sleep(PAUSE)
            self._midway = False
        timeout = min((worker.deadline for worker in self.workers), default=float("inf")) - monotonic()
        for key, _ in self._selector.select(None if timeout == float("inf") else max(timeout, 0.0)):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
            elif key.data in self.workers:  # not buried by the event before
                self._serve(key.data, dead=key.fd == key.data.pidfd)
        for worker in self.workers:
            if monotonic() > worker.deadline:
                worker.killed = True
                worker.process.kill()
                worker.deadline = float("inf")
        return True

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        place = os.memfd_create("wbdist-pool")
        os.pwrite(place, PLACE.pack(-1), 0)
        claims = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        number = next(self._runs.workers)
        start = Start(number, self._runs.plan, self._initializer, os.getpid())
        steps = self._runs.steps
        # A Connection is what the spawning of processes knows how to hand down a descriptor in.
        fds = (theirs.fileno(), place, claims, *([steps.fd] if steps is not None else []))
        down = [PackageConnection(os.dup(fd)) for fd in fds]
        body = (start, *down[:3], down[3] if steps is not None else None)
        process = self._context.Process(target=run_worker, args=body, name=f"wbdist-pool-{number}")
        before = os.environ.get(SPAWNED)
        os.environ[SPAWNED] = "first" if self._born == 0 else "other"
        self._born += 1
        _pipes.add(ours)
        try:
            with session_hidden():
                process.start()
        except BaseException as error:  # noqa: BLE001  (no processes or descriptors left, or what cannot be pickled)
            self._break(error)
            ours.close()
            os.close(place)
            os.close(claims)
            return
        finally:
            if before is None:
                del os.environ[SPAWNED]
            else:
                os.environ[SPAWNED] = before
            theirs.close()
            for connection in down:
                connection.close()
        ours.setblocking(False)
        worker = _Worker(number, process, ours, place, claims)
        self.workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        self._selector.register(worker.pidfd, selectors.EVENT_READ, worker)

    def _hand_out(self) -> None:
        """To each idle worker a chunk, then one ahead to each."""
        for ahead in (0, 1):
            for worker in self.workers:
                if not worker.ready or worker.leaving or worker.skipping or len(worker.queue) != ahead:
                    continue
                if self._max_chunks is not None and worker.chunks + ahead >= self._max_chunks:
                    continue
                chunk = self._next() if ahead else self._next() or self._taken_back()
                if chunk is None:
                    return
                self._hand(worker, chunk)

    def _next(self) -> Chunk | None:
        with self.changed:
            if not self.pending:
                return None
            chunk = self.pending.popleft()
            chunk.job.waiting -= 1
            self.changed.notify_all()
        return chunk

    def _taken_back(self) -> Chunk | None:
        """What a worker has ahead and has not begun."""
        for worker in self.workers:
            if len(worker.queue) < 2 or worker.silent:
                continue
            try:
                os.eventfd_read(worker.claims)
            except BlockingIOError:
                continue
            worker.skipping = True
            worker.job = -1  # it may not have come to see the function
            return worker.queue.pop()
        return None

    def _hand(self, worker: _Worker, chunk: Chunk) -> None:
        worker.queue.append(chunk)
        function = None if worker.job == chunk.job.number else chunk.job.function
        worker.job = chunk.job.number
        body = msgspec.msgpack.encode(Work(chunk.job.number, function, chunk.calls))
        os.eventfd_write(worker.claims, 1)
        self._send(worker, message(Message.WORK, body))

    def _send(self, worker: _Worker, data: bytes) -> None:
        worker.out += data
        self._flush(worker)

    def _flush(self, worker: _Worker) -> None:
        try:
            while worker.out:
                sent = worker.channel.send(memoryview(worker.out)[:_RECEIVE])
                del worker.out[:sent]
        except BlockingIOError:
            pass
        except OSError:  # it is dying: its pidfd will say so
            worker.out.clear()
        if not worker.silent:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.out else 0)
            self._selector.modify(worker.channel, events, worker)

    def _serve(self, worker: _Worker, *, dead: bool) -> None:
        """Something came from the worker, or it can be sent more, or it is dead: then what it had said before still counts."""
        if worker.out and not dead:
            self._flush(worker)
        if not worker.silent:
            try:
                while part := worker.channel.recv(_RECEIVE):
                    worker.received += part
                worker.silent = True
            except BlockingIOError:
                pass
            except OSError:
                worker.silent = True
            self._take(worker)
            if worker.silent:
                self._selector.unregister(worker.channel)
        if dead:
            self._bury(worker)

    def _take(self, worker: _Worker) -> None:
        received = worker.received
        at = 0
        self._midway = len(received) < _RECEIVE // 16
        while len(received) - at >= HEAD.size:
            size = HEAD.unpack_from(received, at)[0]
            end = at + HEAD.size + size
            if end > len(received):
                break
            kind, body = received[at + HEAD.size], bytes(received[at + HEAD.size + 1 : end])
            at = end
            if kind == Message.READY:
                worker.ready = True
                self._stillborn = 0
                self._midway = False
            elif kind == Message.SKIPPED:
                worker.skipping = False
                self._midway = False
            elif kind == Message.BROKEN:
                worker.leaving = True
                self._break(_error(msgspec.msgpack.decode(body, type=Failure), "a worker could not begin"))
            else:
                self._result(worker, *msgspec.msgpack.decode(body, type=Result))
        del received[:at]

    def _result(self, worker: _Worker, index: int, good: bool, payload: bytes) -> None:
        chunk = worker.queue[0]
        job = chunk.job
        worker.reported += 1
        self._stillborn = 0
        value: Any
        if good:
            try:
                value = unpack(payload)
            except Exception as error:  # noqa: BLE001  (whatever an object's own way of being unpickled raises)
                good, value = False, TaskFailedError(f"the result of {job.what} [{index}] cannot be read: {error!r}")
        else:
            value = _error(msgspec.msgpack.decode(payload, type=Failure), job.what)
        job.put(index, good, value)
        if worker.reported == len(chunk.calls):
            self.forget_settled(job)
            self._midway = False
            worker.queue.popleft()
            worker.reported = 0
            worker.chunks += 1
            if self._max_chunks is not None and worker.chunks >= self._max_chunks:
                self._ask_to_leave(worker)

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        self._selector.unregister(worker.pidfd)
        self.workers.remove(worker)
        code = worker.process.exitcode
        if not worker.ready and not worker.leaving:
            self._stillborn += 1
            if code == EXIT_FAILED_FOR_GOOD:
                self._break(MainGuardError("the pool's workers could not load the main script: it is not guarded (see above)"))
            elif self._stillborn >= STILLBORN:
                said = f"{STILLBORN} workers in a row ended before they were ready; the last one, {worker.name}, {_how(code)}"
                self._break(WorkerLostError(said, pid=worker.process.pid, exitcode=code))
        for chunk in reversed(worker.queue):
            self._lose(worker, chunk, worker.reported if chunk is worker.queue[0] else 0)
        worker.channel.close()
        os.close(worker.pidfd)
        os.close(worker.place)
        os.close(worker.claims)

    def _lose(self, worker: _Worker, chunk: Chunk, reported: int) -> None:
        """The task it was at is lost; what it had not begun goes to another worker."""
        rest = chunk.calls[reported:]
        current = PLACE.unpack(os.pread(worker.place, PLACE.size, 0))[0]
        begun = next((at + 1 for at, call in enumerate(rest) if call.task == current), 0)
        job, pid, code = chunk.job, worker.process.pid, worker.process.exitcode
        for call in rest[:begun]:
            text = f"{worker.name} {_how(code)} while it ran task {call.task}, {job.what} [{call.index}]; it is not run again"
            job.put(call.index, False, WorkerLostError(text, call.task, pid, code))
        if rest[begun:] and not (self.terminating or self.broken):
            with self.changed:
                job.waiting += 1
                self.pending.appendleft(Chunk(job, rest[begun:]))
        self.forget_settled(job)

    # Ending -----------------------------------------------------------------------------------------------

    def _break(self, error: BaseException) -> None:
        with self.changed:
            self.broken = self.broken or error
            self._fail_jobs()

    def _fail_jobs(self) -> None:
        """Under the lock: what is not done will not be done."""
        self.pending.clear()
        for job in list(self.jobs.values()):
            job.fail_rest(lambda: self.broken or UsageError("the pool was terminated before this was done"))
        self.jobs.clear()
        self.changed.notify_all()

    def _end_workers(self) -> None:
        at_once = self.terminating or self.broken is not None
        unguarded = isinstance(self.broken, MainGuardError) and not self.terminating
        for worker in self.workers:
            if unguarded and not worker.ready:
                limit = LOADING
            elif worker.ready and not worker.queue:
                if not worker.leaving:
                    self._ask_to_leave(worker)
                limit = self._finish_timeout + TERMINATE
            else:
                limit = TERMINATE
                if at_once and worker.deadline == float("inf") and not worker.killed:
                    worker.process.terminate()
            if at_once and not worker.killed:
                worker.deadline = min(worker.deadline, monotonic() + limit)

    def _ask_to_leave(self, worker: _Worker) -> None:
        worker.leaving = True
        self._send(worker, message(Message.LEAVE))


def _error(told: Failure, what: str) -> BaseException:
    """The exception a worker told of, with its traceback there as the cause."""
    error: Any = None
    if told.error is not None:
        try:
            error = unpack(told.error)
        except Exception:  # noqa: BLE001  (many exception classes do not survive pickling)
            error = None
    made = error if isinstance(error, BaseException) else TaskFailedError(f"{what} raised {told.summary}")
    made.__cause__ = RemoteTraceback(told.trace)
    return made


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with exit code {code}"


def _let_go() -> None:
    for pipe in _pipes:
        with contextlib.suppress(OSError):
            pipe.close()


os.register_at_fork(after_in_child=_let_go)
