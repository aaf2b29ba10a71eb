"""All ranks stop before the same unit: threads for breadth, processes over a real c10d store for reality."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ports import free_port

from wbdist.core.coordination import Coordinator
from wbdist.errors import DeadlineError, PeerLostError
from wbdist.preemption.agreement import StopAgreement
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice

WORKER = Path(__file__).with_name("agreement_worker.py")


class Board:
    """What the ranks of one trial share."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.gone = False


class ThreadCoordinator(Coordinator):
    """The part of `Coordinator` that the agreement uses, for ranks that are threads. `board.gone`: as if its host had died."""

    def __init__(self, board: Board, rank: int, world_size: int) -> None:
        self._board, self._rank, self._world = board, rank, world_size

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world)

    def _open(self) -> dict[str, bytes]:
        if self._board.gone:
            raise PeerLostError("the store that joins the ranks is gone")
        return self._board.keys

    def put(self, key: str, value: bytes) -> None:
        with self._board.changed:
            self._open()[key] = value
            self._board.changed.notify_all()

    def get(self, key: str, timeout: float) -> bytes:
        with self._board.changed:
            if not self._board.changed.wait_for(lambda: key in self._open(), timeout):
                raise DeadlineError(f"no {key}")
            return self._open()[key]

    def peek(self, key: str) -> bytes | None:
        with self._board.changed:
            return self._open().get(key)

    def claim(self, key: str, value: bytes) -> bytes:
        with self._board.changed:
            stands = self._open().setdefault(key, value)
            self._board.changed.notify_all()
            return stands

    def clone(self) -> ThreadCoordinator:
        return ThreadCoordinator(self._board, self._rank, self._world)

    def close(self) -> None: ...


class Rank:
    """One rank of a trial, with a hub of its own."""

    def __init__(self, board: Board, rank: int, world: int, timeout: float = 10.0) -> None:
        self.hub = NoticeHub([])
        self.agreement = StopAgreement(ThreadCoordinator(board, rank, world), self.hub, timeout)

    def tell(self, deadline: float | None = None) -> None:
        self.hub.tell(Notice("test", "told to", time.monotonic(), deadline))


def ranks_of(world: int, timeout: float = 10.0) -> tuple[Board, list[Rank]]:
    board = Board()
    return board, [Rank(board, rank, world, timeout) for rank in range(world)]


def in_threads(bodies: list[Callable[[], None]], timeout: float = 20.0) -> None:
    """Runs all at once; fails when one hangs or raises."""
    problems: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001  (reported by the test's own thread)
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    assert not problems, problems


def trial(seed: int, world: int, *, lockstep: bool) -> tuple[list[int], list[bool]]:
    """One random job: units of random length, a notice to random ranks at random moments; units begun and `agreed`, by rank.

    `lockstep`: every unit has a collective (a barrier that times out), as in DDP on gloo. Without, ranks drift apart
    freely up to 40 units, as the host does with CUDA; the collective is then that the final counts must be equal.
    """
    rng = random.Random(seed)
    total = 400
    _, ranks = ranks_of(world)
    barrier = threading.Barrier(world)
    pace = [rng.choice([0.0, 0.0001, 0.0005]) for _ in range(world)]
    told_at = {rank: rng.randrange(0, 60) for rank in rng.sample(range(world), rng.randint(1, world))}
    begun = [0] * world

    def body(number: int, sleeps: random.Random) -> None:
        rank = ranks[number]
        for unit in range(total):
            if not lockstep:
                while begun[number] > min(begun) + 40 and not rank.agreement._requested:
                    time.sleep(0.0001)
            if told_at.get(number) == unit:
                threading.Thread(target=rank.tell, daemon=True).start()
            if not rank.agreement.begin_unit():
                break
            begun[number] += 1
            if pace[number]:
                time.sleep(sleeps.random() * pace[number])
            if lockstep:
                barrier.wait(60)
        rank.agreement.close()

    in_threads([lambda n=number: body(n, random.Random(seed * 31 + n)) for number in range(world)])  # type: ignore[misc]
    return begun, [rank.agreement.agreed for rank in ranks]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_all_ranks_stop_before_the_same_unit(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves on 67 random schedules a world size, half with a collective in every unit and half with ranks far apart, that all
    ranks begin the same number of units, that none waits for ever, and that all think so."""
    monkeypatch.setattr("wbdist.preemption.agreement.LOOK", 0.005)  # more trials a second; the order of events stays random
    for seed in range(67):
        begun, agreed = trial(seed, world, lockstep=seed % 2 == 0)
        assert len(set(begun)) == 1, f"seed {seed}: {begun}"
        assert all(agreed), f"seed {seed}"


def test_rank_inside_a_later_unit_takes_the_others_along() -> None:
    """Proves the core of the protocol: a rank that has begun unit 7 when the notice comes makes the other run up to 7."""
    _, ranks = ranks_of(2)
    ahead, behind = (rank.agreement for rank in ranks)
    for _ in range(7):
        assert ahead.begin_unit()
    for _ in range(3):
        assert behind.begin_unit()
    ranks[1].tell()
    run = 0
    while behind.begin_unit():
        run += 1
    assert (run, behind.units) == (4, 7)
    assert not ahead.begin_unit()
    assert ahead.notice is not None
    assert ahead.notice.source == "peer"
    assert "rank 1" in ahead.notice.reason
    assert behind.notice is not None
    assert behind.notice.source == "test"


def test_alone_the_contract_is_the_same() -> None:
    """Proves that one rank needs no listener: True until a notice, then False for good, agreed, with no thread."""
    before = threading.active_count()
    rank = Rank(Board(), 0, 1)
    assert threading.active_count() == before
    assert rank.agreement.begin_unit()
    rank.tell()
    assert not rank.agreement.begin_unit()
    assert not rank.agreement.begin_unit()
    assert rank.agreement.agreed
    assert rank.agreement.units == 1
    rank.agreement.close()


def test_notice_before_the_agreement_counts() -> None:
    """Proves that a notice that came while the job was still starting stops it before its first unit."""
    hub = NoticeHub([])
    hub.tell(Notice("test", "early", time.monotonic()))
    agreement = StopAgreement(ThreadCoordinator(Board(), 0, 1), hub, 1.0)
    assert not agreement.begin_unit()
    assert agreement.units == 0


def test_dead_peer_is_bounded_and_named() -> None:
    """Proves that a rank that never answers costs the deadline and no more, is named, and that both others conclude so."""
    board = Board()
    ranks = [Rank(board, rank, 3, timeout=0.5) for rank in (0, 2)]
    began = time.monotonic()
    ranks[0].tell()
    for rank in ranks:
        while rank.agreement.begin_unit():
            time.sleep(0.001)
        assert not rank.agreement.agreed
        assert "rank 1 did not say within 0.5 s" in rank.agreement.missing
    assert time.monotonic() - began < 20.0


def test_advice_that_a_silent_peer_has_not_heard_stops_nobody() -> None:
    """Proves that advice without everybody's answer is dropped, and that the next round counts on, so that a notice after it
    still finds the largest count, whichever ranks had gone on meanwhile."""
    rank = Rank(Board(), 0, 2, timeout=0.3)
    for _ in range(5):
        assert rank.agreement.begin_unit()
    rank.hub.tell(Notice("test", "maybe", time.monotonic(), advice=True))
    while rank.agreement.begin_unit():
        time.sleep(0.001)
    assert not rank.agreement.agreed
    before = rank.agreement.units
    again = rank.agreement.next_round()
    assert again.begin_unit()
    assert again.units == before + 1 > 5
    again.close()


def test_near_deadline_shortens_the_wait() -> None:
    """Proves that nobody waits for a dead peer longer than the notice leaves time for."""
    rank = Rank(Board(), 0, 2, timeout=60.0)
    began = time.monotonic()
    rank.tell(deadline=time.time() + 0.3)
    while rank.agreement.begin_unit():
        time.sleep(0.001)
    assert not rank.agreement.agreed
    assert time.monotonic() - began < 20.0


def test_one_decision_for_all_even_when_a_count_comes_at_the_last_moment() -> None:
    """Proves that the first conclusion stands: a rank that sees every count follows one that has given up already."""
    board = Board()
    ranks = [Rank(board, rank, 2) for rank in range(2)]
    board.keys["stop/decision"] = b'{"missing": "rank 1 did not say in time"}'
    ranks[0].tell()
    for rank in ranks:
        while rank.agreement.begin_unit():
            time.sleep(0.001)
        assert not rank.agreement.agreed


def test_rank_that_finished_does_not_hold_up_the_others() -> None:
    """Proves that `close` leaves the final count: a slower rank, told to stop after that, runs to the end as the other did."""
    _, ranks = ranks_of(2)
    done, slow = (rank.agreement for rank in ranks)
    for _ in range(5):
        assert done.begin_unit()
    done.close()
    assert slow.begin_unit()
    ranks[1].tell()
    begun = 1
    while slow.begin_unit():
        begun += 1
    assert begun == 5
    assert slow.agreed


def test_rank_that_failed_is_known_at_once() -> None:
    """Proves that nobody waits out the deadline for a rank that said it left by an error."""
    _, ranks = ranks_of(2, timeout=30.0)
    ranks[1].agreement.begin_unit()
    ranks[1].agreement.close(failed=True)
    ranks[0].tell()
    began = time.monotonic()
    while ranks[0].agreement.begin_unit():
        time.sleep(0.001)
    assert "rank 1 has left by an error" in ranks[0].agreement.missing
    assert time.monotonic() - began < 20.0


def test_a_vanished_store_is_no_reason_to_stop_but_no_agreement_either() -> None:
    """Proves that ranks go on when the store's host has finished first, and that a later notice ends them without agreement."""
    board, ranks = ranks_of(2)
    board.gone = True
    rank = ranks[0]
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:  # several looks of the listener
        assert rank.agreement.begin_unit()
        time.sleep(0.01)
    rank.tell()
    while rank.agreement.begin_unit():
        time.sleep(0.001)
    assert not rank.agreement.agreed
    assert "store" in rank.agreement.missing


def test_close_is_quick_and_leaves_no_thread() -> None:
    """Proves that `close` waits for nothing: idle, and while an agreement waits for a dead peer."""
    _, idle = ranks_of(2, timeout=30.0)
    waiting = Rank(Board(), 0, 2, timeout=30.0)
    waiting.tell()
    deadline = time.monotonic() + 5
    while not waiting.agreement._requested and time.monotonic() < deadline:
        time.sleep(0.001)
    for agreement in (idle[0].agreement, idle[1].agreement, waiting.agreement):
        began = time.monotonic()
        agreement.close()
        agreement.close()
        assert time.monotonic() - began < 10
        assert agreement._thread is not None
        assert not agreement._thread.is_alive()


def run_workers(world: int, port: int, *extra: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(port), *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def said(worker: subprocess.Popen[str], what: str) -> list[str]:
    """The next line of a worker, which must begin with `what`."""
    assert worker.stdout is not None
    words = worker.stdout.readline().split()
    assert words, f"the worker ended (exit code {worker.wait(10)}) instead of saying {what}"
    assert words[0] == what, words
    return words[1:]


@pytest.mark.slow
def test_real_processes_over_the_real_store() -> None:
    """Proves 10 random stops of 3 processes over torch's TCPStore, each by a real SIGTERM to one of them, with units that meet
    in a real barrier: same unit on all ranks, every time. Then one is killed: the others stop in time and name it."""
    workers = run_workers(3, free_port(), "10")
    rng = random.Random(5)
    try:
        for number in range(10):
            for worker in workers:
                assert said(worker, "running") == [str(number)]
            time.sleep(rng.random() * 0.03)
            workers[rng.randrange(3)].send_signal(signal.SIGTERM)
            ends = [said(worker, "stopped") for worker in workers]
            assert len({units for units, _ in ends}) == 1, ends
            assert {agreed for _, agreed in ends} == {"True"}
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("next\n")
                worker.stdin.flush()
        for worker in workers:
            said(worker, "running")
        workers[2].kill()
        workers[2].wait()
        began = time.monotonic()
        workers[1].send_signal(signal.SIGTERM)
        for worker in workers[:2]:
            assert said(worker, "stopped")[1] == "False"
            assert "rank 2 did not say within 1.0 s" in " ".join(said(worker, "missing"))
        assert time.monotonic() - began < 30
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
