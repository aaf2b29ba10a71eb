"""`wbdist.Pool` as a pool: multiprocessing's methods, and what becomes of tasks whose worker dies."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.waiting import until

import wbdist
from wbdist.distributed.identity import detect
from wbdist.distributed.pool import Pool
from wbdist.distributed.pool_jobs import ResultIterator
from wbdist.distributed.pool_keeper import TaskFailedError, WorkerLostError
from wbdist.errors import UsageError


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(3, context="fork") as made:
        yield made


def square(x: int) -> int:
    return x * x


def stop_at(task: Any) -> Any:
    """A task that dies, fails, or just says what it was given."""
    if isinstance(task, type):
        raise task("on purpose")
    if isinstance(task, int) and task < 0:
        os.kill(os.getpid(), -task)
        time.sleep(60)
    return task


_given: list[str] = []


def initialize(what: str) -> None:
    _given.append(what)


def initialized_with(_: int) -> str:
    return ",".join(_given)


class Unpicklable(Exception):  # noqa: N818
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_methods_are_those_of_multiprocessing(pool: Pool) -> None:
    """Proves that every method gives what multiprocessing.Pool's gives, chunked or not, also with lambdas and endless input."""
    with multiprocessing.get_context("fork").Pool(2) as standard:
        for chunksize in (None, 1, 3, 100):
            assert pool.map(square, range(20), chunksize) == standard.map(square, range(20), chunksize)
            pairs = [(2, n) for n in range(9)]
            assert pool.starmap(pow, pairs, chunksize) == standard.starmap(pow, pairs, chunksize)
        assert pool.map(square, []) == standard.map(square, [])
        assert list(pool.imap(square, range(20), 3)) == list(standard.imap(square, range(20), 3))
        assert sorted(pool.imap_unordered(square, range(20))) == sorted(standard.imap_unordered(square, range(20)))
        assert pool.apply(int, ("11",), {"base": 3}) == standard.apply(int, ("11",), {"base": 3})
    told: list[Any] = []
    made = pool.map_async(lambda x: -x, (1, 2), callback=told.append)
    assert made.get(60) == [-1, -2]
    assert (made.ready(), made.successful(), told) == (True, True, [[-1, -2]])
    failed = pool.apply_async(stop_at, (KeyError,), error_callback=told.append)
    failed.wait(60)
    assert not failed.successful()
    assert isinstance(told[-1], KeyError)
    endless = pool.imap(square, iter(int, 1))
    assert [next(endless) for _ in range(5)] == [0] * 5
    slow = pool.apply_async(time.sleep, (60,))
    for kind in (multiprocessing.TimeoutError, wbdist.Error):
        with pytest.raises(kind):
            slow.get(0.01)
    assert not slow.ready()


def test_progress_of_unordered_results(pool: Pool) -> None:
    """Proves that the iterator tells how many calls have ended, and how many there are once that is known."""
    gate = threading.Event()

    def items() -> Iterator[int]:
        yield from range(5)
        gate.wait(60)

    results = pool.imap_unordered(square, items())
    until(lambda: results.completed == 5, "five results", 60)
    assert results.total is None
    gate.set()
    assert sorted(results) == [0, 1, 4, 9, 16]
    assert (results.completed, results.total) == (5, 5)


def test_exceptions_come_with_the_workers_traceback(pool: Pool) -> None:
    """Proves that a task's exception arrives as itself with its traceback there; as TaskFailedError where it cannot; that
    results, exceptions and arguments that survive no pickling fail their own call alone, and so does a task that exits."""
    with pytest.raises(ValueError, match="on purpose") as raised:
        pool.map(stop_at, [1, ValueError, 3])
    assert "in stop_at" in str(raised.value.__cause__)

    def odd() -> None:
        raise Unpicklable(1, 2)

    for call, expected, text in (
        (odd, TaskFailedError, "1 and 2"),
        (lambda: (x for x in "a"), UsageError, "result generator cannot be sent back"),
        (lambda: exit(3), TaskFailedError, "SystemExit: 3"),
    ):
        with pytest.raises(expected, match=text):
            pool.apply(call)
    with pytest.raises(TypeError):
        pool.apply(square, ((x for x in "a"),))

    def items() -> Iterator[int]:
        yield 2
        raise KeyError("of the iterable")

    results = pool.imap(square, items())
    assert next(results) == 4
    with pytest.raises(KeyError, match="of the iterable"):
        next(results)
    results = pool.imap(stop_at, [1, ValueError, 3])
    assert next(results) == 1
    with pytest.raises(ValueError, match="on purpose"):
        next(results)
    assert list(results) == [3]


def test_a_killed_worker_takes_along_its_own_task_only(pool: Pool) -> None:
    """Proves that the call that a worker dies in is named with its signal, that the others of its chunk and all else are done,
    each once, and that the pool has its workers again."""
    results = pool.imap(stop_at, [0, 1, -signal.SIGKILL, 3, 4, -signal.SIGUSR1, 6], chunksize=4)
    got: list[Any] = []
    while True:
        try:
            got.append(next(results))
        except StopIteration:
            break
        except WorkerLostError as error:
            got.append((error.exitcode, str(error)))
    assert [got[at] for at in (0, 1, 3, 4, 6)] == [0, 1, 3, 4, 6]
    assert got[2][0] == -9
    assert "was killed by SIGKILL while it ran task 2, imap(stop_at) [2]" in got[2][1]
    assert got[5][0] == -signal.SIGUSR1
    with pytest.raises(WorkerLostError, match="ended with exit code 7"):
        pool.apply(os._exit, (7,))
    assert len(set(pool.map(lambda _: (time.sleep(0.05), os.getpid())[1], range(24), chunksize=1))) == 3


def test_work_ahead_waits_for_no_other_work(tmp_path: Path) -> None:
    """Proves that the call that a worker has ahead goes to an idle one while the worker is at a long call; that this worker
    goes on with other calls of that job afterwards; and that one killed at a call loses that one, not what it has ahead."""
    release, back = tmp_path / "release", tmp_path / "back"

    def wait(kill: bool) -> None:
        until(release.exists, "the release")
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(n: int) -> int:
        time.sleep(0.005)
        return n

    with Pool(2, context="fork") as pool:
        for kill in (False, True):
            long = pool.apply_async(wait, (kill,))

            def numbers(long: Any = long) -> Iterator[int]:
                yield from range(8)
                until(back.exists, "the first eight")
                release.touch()
                long.wait(90)
                yield from range(8, 40)

            results = pool.imap_unordered(work, numbers())
            assert sorted(results.next(90) for _ in range(8)) == list(range(8))
            back.touch()
            assert sorted(results.next(90) for _ in range(32)) == list(range(8, 40))
            if kill:
                with pytest.raises(WorkerLostError, match="SIGKILL"):
                    long.get(90)
            else:
                assert long.get(90) is None
            release.unlink()
            back.unlink()


def test_a_worker_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a pool made in a rank has workers that know that they are none, whatever they inherited."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Pool(1, context="fork") as pool:
        found = pool.apply(detect)
    assert (found.source, found.rank, found.world_size) == ("pool", 0, 1)


def test_workers_killed_at_any_moment_never_hang_the_pool(tmp_path: Path) -> None:
    """Proves that while random workers are killed at random moments, starting, idle or busy, reading or writing, every call of
    a job ends: with its value, or as lost; and that no call is made twice.

    A kill waits until the workers have begun five calls more, so that one has had a result: on a slow machine all would die as
    they start, which rightly ends the pool."""
    made = tmp_path / "made"

    def work(n: int) -> tuple[int, bytes]:
        with made.open("a") as file:
            file.write(f"{n}\n")
        return n, bytes(300_000 if n % 5 == 0 else 10)

    chance = random.Random(7)
    with Pool(4, context="fork") as pool:
        stop = threading.Event()
        lost: list[Any] = []
        done: list[int] = []

        def kill() -> None:
            seen = 0
            while not stop.wait(chance.uniform(0.0, 0.02)):
                size = made.stat().st_size if made.exists() else 0
                if size < seen + 5 * len("899\n"):
                    continue
                seen = size
                workers = [child for child in psutil.Process().children() if child.pid in pool.pids]
                if workers:
                    with suppress(psutil.NoSuchProcess):
                        chance.choice(workers).kill()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            for start in (lambda: pool.imap_unordered(work, range(600), 3), lambda: pool.imap(work, range(600, 900))):
                results = start()
                while True:
                    try:
                        done.append(results.next(90)[0])
                    except StopIteration:
                        break
                    except WorkerLostError as error:
                        lost.append(error.task)
        finally:
            stop.set()
            killer.join()
    begun = [int(line) for line in made.read_text().split()]
    assert lost, "no worker was killed at work"
    assert sorted(lost + done) == list(range(900))
    assert len(begun) == len(set(begun))
    assert set(done) <= set(begun)


def test_ends(tmp_path: Path) -> None:
    """Proves that close lets everything finish, terminate drops it at once and says so, that neither leaves a process, and
    that an ended pool, or one in a forked child, refuses work."""
    pool = Pool(2, context="fork")
    made = pool.map_async(square, range(50))
    with pytest.raises(ValueError, match="close"):
        pool.join()
    pool.close()
    pool.join()
    assert made.get(0) == [square(n) for n in range(50)]
    with pytest.raises(ValueError, match="does not take work"):
        pool.map(square, [1])
    pids = tmp_path / "pids"

    def linger(_: int) -> None:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(60)

    with Pool(2, context="fork") as pool:
        stuck = pool.map_async(linger, range(4), chunksize=1)
        until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "two tasks", 60)
        with pytest.raises(UsageError, match="process that made it"):
            _in_a_fork(lambda: pool.apply(square, (2,)))
    with pytest.raises(UsageError, match="terminated"):
        stuck.get(60)
    assert not [pid for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)]


def _in_a_fork(act: Callable[[], object]) -> None:
    """Raises in this process what `act` raised in a forked one."""
    read, write = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:  # noqa: BLE001
            write.send(error)
        os._exit(0)
    os.waitpid(child, 0)
    if read.poll():
        raise read.recv()


def test_initializer_and_replacement() -> None:
    """Proves that the initializer runs in each worker, that a failing one ends all work with its own error, and that workers
    are replaced after `maxtasksperchild` chunks."""
    with Pool(2, initialize, ("yes",), context="fork") as pool:
        assert set(pool.map(initialized_with, range(8))) == {"yes"}
    with Pool(2, stop_at, (ZeroDivisionError,), context="fork") as pool:
        with pytest.raises(ZeroDivisionError, match="on purpose") as raised:
            pool.map(square, range(3))
        assert "in stop_at" in str(raised.value.__cause__)
    with Pool(2, maxtasksperchild=2, context="fork") as pool:
        pids = pool.map(lambda _: os.getpid(), range(12), chunksize=1)
        assert max(pids.count(pid) for pid in pids) == 2


def test_nothing_that_a_caller_gives_leaves_others_waiting(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that an iterable and a callback which end their thread are heard of, and that the pool goes on."""

    def leaving() -> Iterator[int]:
        yield 2
        sys.exit("no more of this")

    results = pool.imap(square, leaving())
    assert results.next(timeout=60) == 4
    with pytest.raises(SystemExit, match="no more of this"):
        results.next(timeout=60)
    assert pool.apply_async(square, (3,), callback=sys.exit).get(timeout=60) == 9
    assert "the callback of apply(square) failed" in capsys.readouterr().err
    assert pool.apply_async(square, (4,)).get(timeout=60) == 16


def test_a_pool_that_cannot_go_on_says_why() -> None:
    """Proves that a pool without descriptors for a new worker raises that from all it is asked, and leaves no worker."""
    pool = Pool(2, context="fork")
    assert pool.apply_async(square, (2,)).get(timeout=60) == 4
    pids = pool.pids
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(WorkerLostError):
            pool.apply_async(stop_at, (-signal.SIGKILL,)).get(timeout=60)
        pool._keeper.join(60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for ask in (lambda: pool.apply(square, (2,)), lambda: pool.imap(square, [2])):
        with pytest.raises(OSError, match="Too many open files"):
            ask()
    with pytest.raises(OSError, match="Too many open files"):  # it broke after the call had looked
        pool._keeper.register(ResultIterator(1, b"", "imap(square)", ordered=True))
    pool.terminate()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_bad_arguments_are_refused() -> None:
    """Proves that what cannot be is refused with what was given, before any process is started."""
    for given, text in (
        ({"processes": 0}, "processes=0"),
        ({"maxtasksperchild": 0}, "maxtasksperchild=0"),
        ({"initializer": 3}, "int"),
        ({"context": "forkserver"}, "forkserver"),
        ({"runs": "mine"}, "runs='mine'"),
        ({"runs": "parent"}, "needs an open run"),
        ({"runs": "task"}, "init="),
        ({"init": {"project": "p"}, "runs": "none"}, "init="),
    ):
        with pytest.raises(UsageError, match=text):
            Pool(**given)
