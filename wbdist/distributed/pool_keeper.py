"""The thread that keeps a pool: starts workers, hands out work, takes results, notices deaths.

    starting --READY--> idle --chunk--> busy --its results--> idle --LEAVE--> leaving --> gone
    any --killed--> gone: the call it was at is lost and said so, the calls of its chunk behind that go to another worker

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
    def __init__(self, number: int, process: Any, channel: socket.socket, place: int) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.place = place
        self.pidfd = os.pidfd_open(process.pid)
        self.ready = False
        self.leaving = False
        self.chunk: Chunk | None = None
        self.reported = 0
        """Calls of the chunk whose results are here."""
        self.job = -1
        """Whose function it has."""
        self.chunks = 0
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
        """The job's calls come later, one by one."""
        with self.changed:
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
            done = not self.pending and not any(worker.chunk for worker in self.workers)
            ending = self.terminating or self.broken is not None or (self.closing and done and not self.jobs)
            wanted = 0 if ending else self._size
        if ending:
            self._end_workers()
            if not self.workers:
                return False
        while sum(not worker.leaving for worker in self.workers) < wanted and self.broken is None:
            self._start()
        self._hand_out()
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
        number = next(self._runs.workers)
        start = Start(number, self._runs.plan, self._initializer, os.getpid())
        steps = self._runs.steps
        # A Connection is what the spawning of processes knows how to hand down a descriptor in.
        down = [PackageConnection(os.dup(fd)) for fd in (theirs.fileno(), place, *([steps.fd] if steps is not None else []))]
        body = (start, down[0], down[1], down[2] if steps is not None else None)
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
        worker = _Worker(number, process, ours, place)
        self.workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        self._selector.register(worker.pidfd, selectors.EVENT_READ, worker)

    def _hand_out(self) -> None:
        for worker in self.workers:
            if not worker.ready or worker.leaving or worker.chunk is not None:
                continue
            with self.changed:
                if not self.pending:
                    return
                chunk = worker.chunk = self.pending.popleft()
                chunk.job.waiting -= 1
                self.changed.notify_all()
            worker.reported = 0
            function = None if worker.job == chunk.job.number else chunk.job.function
            worker.job = chunk.job.number
            body = msgspec.msgpack.encode(Work(chunk.job.number, function, chunk.calls))
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
            elif kind == Message.BROKEN:
                worker.leaving = True
                self._break(_error(msgspec.msgpack.decode(body, type=Failure), "a worker could not begin"))
            else:
                self._result(worker, *msgspec.msgpack.decode(body, type=Result))
        del received[:at]

    def _result(self, worker: _Worker, index: int, good: bool, payload: bytes) -> None:
        chunk = worker.chunk
        assert chunk is not None
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
            worker.chunk = None
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
        if worker.chunk is not None:
            self._lose(worker, worker.chunk)
        worker.channel.close()
        os.close(worker.pidfd)
        os.close(worker.place)

    def _lose(self, worker: _Worker, chunk: Chunk) -> None:
        """The task it was at is lost; what it had not begun goes to another worker."""
        rest = chunk.calls[worker.reported :]
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
            elif worker.ready and worker.chunk is None:
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
