"""64 ranks as threads of one process: in one run, and in a run each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.journals import rows_of

import wbdist
from wbdist.run import lifecycle

RANKS = 64
ROWS = 200


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    for run in lifecycle.active_runs():
        run.finish(1)


@pytest.mark.parametrize("own", [False, True], ids=["one run", "a run each"])
def test_64_threads_log(own: bool) -> None:
    """Proves that rows of 64 threads are all there, each once, each thread's in its order, and each row at a step of its
    own."""
    settings = wbdist.Settings(mode="offline", silent=True, console="off", x_disable_stats=True)
    opened = [wbdist.init(project="p", reinit="create_new", settings=settings) for _ in range(RANKS if own else 1)]
    together = threading.Barrier(RANKS)

    def rank(number: int) -> None:
        run = opened[number % len(opened)]
        together.wait(60)
        for i in range(ROWS):
            run.log({"rank": number, "i": i})

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive()
    found: dict[int, list[int]] = {number: [] for number in range(RANKS)}
    for run in opened:
        run.finish()
        assert run.journal_path is not None
        rows = rows_of(run.journal_path)
        assert [row["_step"] for row in rows] == list(range(len(rows)))
        for row in rows:
            found[row["rank"]].append(row["i"])
    assert found == {number: list(range(ROWS)) for number in range(RANKS)}
