"""A pool's worker process, and what it and the pool say to each other over the worker's own socket.

    pool -> worker                                worker -> pool
    WORK   a job's number (with its function,     READY    waits for work
           unless it is the last job's), and      RESULT   (index, good, payload) of a call
           calls: (task, index, arguments)        SKIPPED  work that was taken back
    LEAVE  end well                               BROKEN   why it cannot work at all

A worker has work ahead, so that it need not wait for the pool between two pieces. Each piece is claimed before it is begun, by
one count of an eventfd: by the worker, or by the pool, which then gives it to another.

Messages are MessagePack, length first. A call's arguments and result are pickled one by one, so that one that cannot be sent
or read fails alone. The task that a worker is at stands in memory that it shares with the pool: that is how the pool knows,
when the worker is killed, which task is lost and which had not begun.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

import msgspec

from wbdist.distributed.identity import POOL_WORKER
from wbdist.distributed.pool_runs import Plan, WorkerRuns
from wbdist.distributed.pool_steps import SharedSteps
from wbdist.distributed.processes import default_signals, dumped, loaded, unpacked
from wbdist.errors import UsageError
from wbdist.launch.worker import PR_SET_PDEATHSIG

HEAD: Final = struct.Struct("<Q")
PLACE: Final = struct.Struct("<q")
_PLAIN: Final = frozenset({int, float, str, bytes, bool, type(None)})


class Message(IntEnum):
    WORK = 1
    LEAVE = 2
    READY = 3
    RESULT = 4
    BROKEN = 5
    SKIPPED = 6


class Call(msgspec.Struct, array_like=True):
    task: int
    """Number in the pool, or in the run that it logs to."""
    index: int
    """Place among the results of its job."""
    arguments: bytes


class Work(msgspec.Struct, array_like=True):
    job: int
    function: bytes | None
    calls: list[Call]


class Failure(msgspec.Struct):
    """An exception as it travels: its text, and itself where it can be pickled."""

    summary: str
    trace: str
    error: bytes | None


Result = tuple[int, bool, bytes]


class Start(msgspec.Struct, frozen=True):
    """What a worker is told when it is started."""

    number: int
    plan: Plan
    initializer: bytes | None
    parent: int


def pack(value: Any) -> bytes:
    """A result. Plain scalars, and tuples of them, go the way that takes a microsecond; all else by dill, which takes tens of
    them. Raises whatever an object raises."""
    return b"p" + pickle.dumps(value, 5) if _is_plain(value) else b"d" + dumped(value)


def pack_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """Arguments, in the same two ways."""
    call = (args, dict(kwargs))
    plain = all(map(_is_plain, args)) and all(map(_is_plain, call[1].values()))
    return b"p" + pickle.dumps(call, 5) if plain else b"d" + dumped(call)


def unpack(data: bytes) -> Any:
    return pickle.loads(memoryview(data)[1:]) if data[:1] == b"p" else loaded(data[1:])  # noqa: S301  (of our own process)


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(type(each) in _PLAIN for each in value))


def message(kind: Message, body: bytes = b"") -> bytes:
    return HEAD.pack(len(body) + 1) + bytes((kind,)) + body


def failure(error: BaseException) -> bytes:
    # The frames of the worker itself say nothing.
    shown = error.__traceback__.tb_next if error.__traceback__ is not None else None
    trace = "".join(traceback.format_exception(type(error), error, shown))
    summary = "".join(traceback.format_exception_only(error)).strip()
    try:
        kept = None if isinstance(error, SystemExit | KeyboardInterrupt) else pack(error)
    except Exception:  # noqa: BLE001  (then its text has to do)
        kept = None
    return msgspec.msgpack.encode(Failure(summary, trace, kept))


def run_worker(start: Start, channel: Any, place: Any, claims: Any, steps: Any) -> None:
    """Body of the process. All but the first hold descriptors: the socket, the place of the current task, the claims to pieces
    of work, the run's steps."""
    _tie_to(start.parent)
    default_signals()
    # Ctrl-C reaches the whole terminal: the parent decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[POOL_WORKER] = f"{start.number}:{os.getpid()}"
    own = socket.socket(fileno=os.dup(channel.fileno()))
    channel.close()
    runs = WorkerRuns(start.plan, start.number, SharedSteps(steps.fileno()) if steps is not None else None)
    try:
        runs.begin()
        if start.initializer is not None:
            initializer, arguments, _ = unpacked(start.initializer)
            initializer(*arguments)
            runs.initialized()
    except BaseException as error:  # noqa: BLE001  (everything that ends a worker before it works is told the pool)
        own.sendall(message(Message.BROKEN, failure(error)))
        runs.end(1)
        return
    own.sendall(message(Message.READY))
    _Worker(own, runs, place.fileno(), claims.fileno()).work()
    runs.end(0)


def _tie_to(parent: int) -> None:
    """SIGKILL when the pool's process dies, however: its tasks have nobody left who wants them."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)


class _Worker:
    def __init__(self, channel: socket.socket, runs: WorkerRuns, place: int, claims: int) -> None:
        self._channel = channel
        self._runs = runs
        self._place = place
        self._claims = claims
        self._function: tuple[int, Any] = (-1, None)

    def work(self) -> None:
        while True:
            body = self._receive()
            if body is None or body[0] == Message.LEAVE:
                return
            try:
                os.eventfd_read(self._claims)
            except BlockingIOError:
                self._channel.sendall(message(Message.SKIPPED))
                continue
            work = msgspec.msgpack.decode(body[1:], type=Work)
            for call in work.calls:
                # Each result goes out before the next call begins: who is killed takes along one task. Rejected: holding
                # back those of quick calls, which is 3 us cheaper a call.
                self._channel.sendall(message(Message.RESULT, msgspec.msgpack.encode(self._call(work, call))))

    def _call(self, work: Work, call: Call) -> Result:
        os.pwrite(self._place, PLACE.pack(call.task), 0)
        try:
            function = self._function_of(work)
            arguments, options = unpack(call.arguments)
            self._runs.begin_task(call.task)
        except Exception as error:  # noqa: BLE001  (whatever an argument's own way of being unpickled raises)
            return call.index, False, failure(error)
        failed: BaseException | None = None
        value = None
        try:
            value = function(*arguments, **options)
        except BaseException as error:  # noqa: BLE001  (also SystemExit: the pool says so, and the worker goes on)
            failed = error
        try:
            self._runs.end_task(failed)
        except Exception as error:  # noqa: BLE001  (a disk that is full fails the task, not the worker)
            failed = failed or error
        if failed is None:
            try:
                payload = pack(value)
            except Exception as error:  # noqa: BLE001  (as above)
                failed = UsageError(f"the result {type(value).__name__} cannot be sent back: {error}")
        return (call.index, True, payload) if failed is None else (call.index, False, failure(failed))

    def _function_of(self, work: Work) -> Any:
        job, function = self._function
        if job != work.job:
            assert work.function is not None
            function = loaded(work.function)[0]
            self._function = (work.job, function)
        return function

    def _receive(self) -> bytes | None:
        head = self._read(HEAD.size)
        return None if head is None else self._read(HEAD.unpack(head)[0])

    def _read(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            part = self._channel.recv(min(size - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)
