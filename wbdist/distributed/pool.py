"""`wbdist.Pool`: `multiprocessing.Pool`, whose workers log, and which survives their deaths."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import multiprocess
import multiprocess.util

from wbdist.distributed.pool_jobs import AsyncResult, MapResult, ResultIterator, check_chunksize, chunked
from wbdist.distributed.pool_keeper import Chunk, Keeper
from wbdist.distributed.pool_runs import Runs
from wbdist.distributed.pool_worker import Call, pack_call
from wbdist.distributed.processes import packed
from wbdist.errors import UsageError
from wbdist.run.handle import Run
from wbdist.run.main_guard import check_child, check_parent

AHEAD = 3
"""Chunks of an `imap` that are taken from its iterable before a worker is free for them, for each worker."""


class Pool:
    """Worker processes that call functions: the methods of `multiprocessing.Pool`, and three things that one has not.

    Workers log. `wbdist.run`, `wbdist.log` and so on in a task mean a part of the run that is open where the pool was made
    (`runs="parent"`, the default where there is one), a run a worker process or a run a task, grouped with it (`"worker"`,
    `"task"`; `init=` has arguments of `wbdist.init` where no run is open), or nothing (`"none"`). What a task logged is on disk
    when `log` returns and outlives the worker and the parent.

    A worker that dies takes along the one task it was at, whose result is then a WorkerLostError that names it; the pool goes
    on with a new worker. Functions, arguments and results may be lambdas, closures, a notebook's classes (dill).

    Steps with `runs="parent"`: a row without `step` gets the next free step of all processes of the run, so rows of the parent
    and of all workers have different steps, in the order in which they were logged. An explicit step is kept; it may begin anew
    with each task, and rows of several tasks may share one. The columns `pool/task` and `pool/worker` tell whose a row is.

    Make it under a main guard (`context="fork"` needs none), in any thread; use it from any thread of the same process.
    `with` ends it: work that is not done is dropped. Ctrl-C is left to the parent: workers ignore SIGINT.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        runs: str | None = None,
        run: Run | None = None,
        init: Mapping[str, Any] | None = None,
    ) -> None:
        """Returns at once; the workers come up meanwhile.

        `processes`: default, one a usable CPU. `initializer(*initargs)` runs first in each worker; when it raises, that is
        raised by everything that is asked of the pool. `maxtasksperchild`: chunks of work after which a worker is replaced.
        `context`: "spawn" (the default, unless `multiprocess.set_start_method("fork")` was called), "fork", or a context of
        `multiprocessing`. `run`: instead of the global one.

        Raises UsageError for arguments that cannot be; MainGuardError in a child that only loads an unguarded script.
        """
        check_child("wbdist.Pool()")
        method = _method(context)
        if method != "fork":
            check_parent("wbdist.Pool()")
        if processes is None:
            processes = len(os.sched_getaffinity(0))
        if type(processes) is not int or processes < 1:
            raise UsageError(f"processes={processes!r} must be a whole number, 1 or more")
        if maxtasksperchild is not None and (type(maxtasksperchild) is not int or maxtasksperchild < 1):
            raise UsageError(f"maxtasksperchild={maxtasksperchild!r} must be a whole number, 1 or more, or None")
        if initializer is not None and not callable(initializer):
            raise UsageError(f"initializer must be a function; got {type(initializer).__name__}")
        self._pid = os.getpid()
        self._runs = Runs(runs, run, init)
        self._size = processes
        self._numbers = itertools.count()
        self._numbering = threading.Lock()
        begin = None if initializer is None else packed(initializer, tuple(initargs), {})
        timeout = self._runs.finish_timeout
        self._keeper = Keeper(multiprocess.get_context(method), processes, self._runs, begin, maxtasksperchild, timeout)
        self._keeper.start()
        # At the end of the process, and when nobody holds the pool any more; not in forked children.
        self._end = multiprocess.util.Finalize(self, _terminate, args=(self._keeper,), exitpriority=15)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers there are now."""
        return [worker.process.pid for worker in list(self._keeper.workers)]

    # Calls --------------------------------------------------------------------------------------------------

    def apply(self, func: Callable[..., Any], args: Sequence[Any] = (), kwds: Mapping[str, Any] | None = None) -> Any:
        """`func(*args, **kwds)` in a worker; blocks for its result. Raises as `AsyncResult.get`."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Sequence[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """As `apply`, without waiting. Callbacks run in the pool's thread: keep them short."""
        number, function, what = self._job(func, "apply")
        job = AsyncResult(number, function, what, callback, error_callback)
        call = Call(self._task(), 0, pack_call(tuple(args), kwds or {}))
        self._keeper.submit([Chunk(job, [call])])
        return job

    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """The results in order; raises what the first failed call raised, when all have ended."""
        return self.map_async(func, iterable, chunksize).get()  # type: ignore[no-any-return]

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> MapResult:
        return self._map(func, ((item,) for item in iterable), chunksize, callback, error_callback, "map")

    def starmap(self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None) -> list[Any]:
        """As `map`, with several arguments a call."""
        return self.starmap_async(func, iterable, chunksize).get()  # type: ignore[no-any-return]

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> MapResult:
        return self._map(func, map(tuple, iterable), chunksize, callback, error_callback, "starmap")

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> ResultIterator:
        """An iterator over the results, in order, each as soon as it is there.

        `iterable` is read by a thread of its own, no further ahead than the workers need; it may be endless, or wait for
        earlier results.
        """
        return self._imap(func, iterable, chunksize, ordered=True)

    def imap_unordered(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> ResultIterator:
        """As `imap`, in the order in which the calls end. Its `completed` and `total` tell the progress."""
        return self._imap(func, iterable, chunksize, ordered=False)

    # Ending -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Takes no more work; workers leave when all is done, having finished their runs."""
        self._check_process()
        with self._keeper.changed:
            self._keeper.closing = True
        self._keeper.wake()

    def terminate(self) -> None:
        """Drops what is not done: its results raise UsageError. Blocks until no worker is left: idle ones finish their runs
        first, busy ones get SIGTERM, and SIGKILL 5 s later."""
        self._check_process()
        self._end()

    def join(self) -> None:
        """After `close` or `terminate`: blocks until all workers have ended. Raises ValueError before."""
        if not (self._keeper.closing or self._keeper.terminating or self._keeper.broken is not None):
            raise ValueError("the pool still takes work: call close() or terminate() before join()")
        self._keeper.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.terminate()

    def __reduce__(self) -> Any:
        raise NotImplementedError("a pool cannot be sent to another process; make one there")

    # Inner --------------------------------------------------------------------------------------------------

    def _map(  # noqa: PLR0917  (as its callers')
        self,
        func: Callable[..., Any],
        arguments: Iterable[tuple[Any, ...]],
        chunksize: int | None,
        callback: Any,
        error_callback: Any,
        what: str,
    ) -> MapResult:
        if chunksize is not None:
            check_chunksize(chunksize)
        number, function, said = self._job(func, what)
        with self._numbering:
            calls = [Call(next(self._runs.tasks), index, pack_call(given, {})) for index, given in enumerate(arguments)]
        job = MapResult(number, function, said, len(calls), callback, error_callback)
        size = chunksize or max(1, -(-len(calls) // (4 * self._size)))
        if calls:
            self._keeper.submit([Chunk(job, part) for part in chunked(size, iter(calls))])
        return job

    def _imap(self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int, *, ordered: bool) -> ResultIterator:
        check_chunksize(chunksize)
        number, function, said = self._job(func, "imap" if ordered else "imap_unordered")
        job = ResultIterator(number, function, said, ordered=ordered)
        self._keeper.register(job)
        feed = functools.partial(_feed, self._keeper, job, iterable, chunksize, AHEAD * self._size, self._task)
        threading.Thread(target=feed, name="wbdist-pool-imap", daemon=True).start()
        return job

    def _job(self, func: Callable[..., Any], what: str) -> tuple[int, bytes, str]:
        self._check_process()
        if self._keeper.closing or self._keeper.terminating:
            raise ValueError("the pool does not take work any more: close() or terminate() was called")
        if self._keeper.broken is not None:
            raise self._keeper.broken
        if not callable(func):
            raise UsageError(f"{what}() needs a function; got {type(func).__name__}")
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", type(func).__name__)
        return next(self._numbers), packed(func, (), {}), f"{what}({name})"

    def _task(self) -> int:
        with self._numbering:
            return next(self._runs.tasks)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise UsageError("a pool belongs to the process that made it; make one in the child")


def _method(context: Any) -> str:
    """Contexts of the standard library are taken for their start method: their objects do not mix with ours."""
    if context is None:
        return "fork" if multiprocess.get_start_method(allow_none=True) == "fork" else "spawn"
    method = context if isinstance(context, str) else context.get_start_method()
    if method not in {"spawn", "fork"}:
        raise UsageError(f"context={method!r} is not one that a pool can use; choose spawn or fork")
    return str(method)


def _terminate(keeper: Keeper) -> None:
    with keeper.changed:
        keeper.terminating = True
    keeper.wake()
    if threading.current_thread() is not keeper:
        keeper.join()


def _feed(  # noqa: PLR0917  (as its caller has them)
    keeper: Keeper, job: ResultIterator, iterable: Iterable[Any], chunksize: int, ahead: int, task: Callable[[], int]
) -> None:
    """Body of an imap's own thread: from its iterable to the workers."""
    index = 0
    try:
        for part in chunked(chunksize, iter(iterable)):
            calls = [Call(task(), index + at, pack_call((item,), {})) for at, item in enumerate(part)]
            if not keeper.submit_when(job, calls, ahead):
                return
            index += len(part)
        job.ends_at(index)
    except BaseException as error:  # noqa: BLE001  (the iterable's own, SystemExit too: it stands where its next item would)
        job.put(index, False, error)
        job.ends_at(index + 1)
    keeper.forget_settled(job)
