"""Old attempts that do not know that they are old, and two incarnations that both believe to be the attempt."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.inprocess import World, cut, lines_of
from support.lingering import kill_all, shippers_of
from support.serving import Server
from support.waiting import until

import wbdist
from wbdist.core.position import HISTORY
from wbdist.core.states import RunState
from wbdist.run.journal import JournalWriter, find_journals
from wbdist.run.shipper.delivery import Delivery

ZOMBIE = Path(__file__).parent / "zombie.py"
POSTS_A_MINUTE = 240
"""A shipper of ours posts every 0.25 s."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def write(world: World, journal: JournalWriter, step: int, who: str) -> None:
    journal.append_row({"who": who, "at": step}, step=step, commit=True, time=world.now)


def run(world: World, delivery: Delivery) -> None:
    """Until everything readable is acknowledged, or the delivery is over."""
    ticket = delivery.ask()
    for _ in range(50):
        delivery.step(world.now)
        if delivery.finished or delivery.flushed >= ticket:
            return
    raise AssertionError(f"not delivered: {delivery.trouble}")


def test_a_minute_of_a_zombie_is_archived_whole_and_shown_nowhere(world: World) -> None:
    """Proves that an attempt that was superseded at step 5 and goes on posting for a minute, beside its successor and over a
    restart of the server, changes at no moment what the run shows, and that every row of it is kept."""
    old = world.journal(1)
    for step in range(10):
        write(world, old, step, "old")
    of_old = world.delivery(old)
    run(world, of_old)
    new = world.journal(2, base=cut([old], 4))
    of_new = world.delivery(new)
    expected = [("old", step) for step in range(5)]
    for post in range(POSTS_A_MINUTE):
        world.now += 60 / POSTS_A_MINUTE
        write(world, old, 10 + post, "old")
        if post % 3 == 0:
            step = 5 + post // 3
            write(world, new, step, "new")
            expected.append(("new", step))
        for delivery in (of_new, of_old) if post % 2 else (of_old, of_new):
            run(world, delivery)
        if post == POSTS_A_MINUTE // 2:
            world.restart()
        if post % 20 == 0:
            assert [(row["who"], row["_step"]) for row in world.rows()] == expected
    assert of_old.fenced
    assert not of_new.fenced
    assert [(row["who"], row["_step"]) for row in world.rows()] == expected
    assert [(row["who"], row["_step"]) for row in world.rows(attempt=1)] == [("old", step) for step in range(250)]
    found = world.run
    assert found is not None
    assert (found.state, found.summary["who"]) == (RunState.RUNNING, "new")
    old.close(1)
    run(world, of_old)
    first, second = world.attempts()[1], world.attempts()[2]
    assert (first.rows, first.rows_live, first.end_cause, first.exit_code) == (250, 5, "exit", 1)
    assert (second.rows, second.rows_live, second.end_cause) == (80, 80, "")
    assert world.run is not None
    assert world.run.state == RunState.RUNNING


def test_of_two_incarnations_of_one_attempt_one_wins_and_the_other_is_kept_apart(world: World) -> None:
    """Proves that of a double requeue exactly one owns the attempt; that the other is told, at once; and that its rows take no
    places in the attempt and are all in the archive, under its own nonce, however often and in whatever order both arrive."""
    old = world.journal(1)
    for step in range(6):
        write(world, old, step, "old")
    base = cut([old], 4)
    twins = [world.journal(2, nonce=nonce, base=base) for nonce in ("left", "right")]
    deliveries = [world.delivery(twin) for twin in twins]
    run(world, world.delivery(old))
    for step in range(5, 40):
        for twin, delivery in zip(twins, deliveries, strict=True):
            write(world, twin, step, twin.header.nonce)
            run(world, delivery)
    assert [delivery.fenced for delivery in deliveries] == [False, True]
    assert "another job holds attempt 2" in deliveries[1].error
    expected = [("old", step) for step in range(5)] + [("left", step) for step in range(5, 40)]
    for _ in range(2):
        assert [(row["who"], row["_step"]) for row in world.rows()] == expected
        kept = [(row["who"], row["_step"]) for row in world.rows(attempt=2, nonce="right")]
        assert [row for row in kept if row[0] == "right"] == [("right", step) for step in range(5, 40)]
        assert world.attempts()[2].rows == 35
        world.sync([twin.path for twin in reversed(twins)])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_a_zombie_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in real time: two processes, as on two machines, each with its own disk and shipper, one real server."""
    server = Server(tmp_path / "server")
    server.start()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", server.key)
    processes: list[subprocess.Popen[bytes]] = []

    def start(place: str, attempt: int, seconds: float, *more: str) -> Path:
        (tmp_path / place).mkdir()
        command = [sys.executable, str(ZOMBIE), place, str(attempt), str(seconds), *more]
        processes.append(subprocess.Popen(command, cwd=tmp_path / place))
        return tmp_path / place / "position.json"

    try:
        position = start("old", 1, 60.0)
        until(position.exists, "the old attempt's checkpoint")
        time.sleep(1.0)  # rows beyond it
        start("new", 2, 20.0, str(position))
        assert [process.wait(120) for process in processes] == [0, 0]
        api = wbdist.Api()
        (shown,) = api.runs("zombies")
        rows = list(shown.scan_history())
        pinned = msgspec.json.decode(position.read_bytes())["watermark"]["step"]
        whose = [row["who"] for row in rows]
        assert whose == ["old"] * (pinned + 1) + ["new"] * (len(rows) - pinned - 1)
        assert [row["_step"] for row in rows] == list(range(len(rows)))
        attempts = {entry.attempt: entry for entry in shown.attempts()}
        for number, place in ((1, "old"), (2, "new")):
            (journal,) = find_journals(tmp_path / place / "wandb")
            written = [msgspec.json.decode(line)["at"] for line in lines_of(journal)[HISTORY]]
            assert attempts[number].rows == len(written)
            kept = [row["at"] for row in shown.scan_history(attempt=number) if row["who"] == place]
            assert Counter(kept) == Counter(written)
        assert attempts[1].rows_live == pinned + 1
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
        kill_all(shippers_of(tmp_path))
        server.stop()
