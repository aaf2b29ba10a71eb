"""Where an attempt's time went, as the store tells it from marks, rows and samples."""

from __future__ import annotations

from typing import Any

import pytest
from support.storing import StoredRun, cut, rows

from wbdist.core.goodput import OWN, goodput
from wbdist.core.position import EVENTS, PHASES
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import SqlStore

ZERO = dict.fromkeys(OWN, 0.0)


def mark(n: int, at: float, phase: str, step: int = 0, **spent: float) -> dict[str, Any]:
    return {"n": n, "phase": phase, "_step": step, **ZERO, **spent, "_timestamp": at}


def test_the_time_of_attempts(store: SqlStore) -> None:
    """Proves that attempts have phases that add up, also one that was killed, one that never came to a mark, and one whose
    marks came by two writers, some twice; that lost time is counted by marks then; and that marks are in no history."""
    run = StoredRun(store)
    run.begin(1)
    first = [
        mark(0, 110, "startup", startup=10),
        mark(1, 112, "train", startup=12),
        mark(2, 132, "save", 5, startup=12, train=20),
        mark(3, 133, "train", 5, startup=12, train=20, save=1),
    ]
    run.append(1, 0, [{**row, "_timestamp": 112.0 + 4 * row["_step"]} for row in rows(range(9))])
    assert [attempt.phases for attempt in store.attempts(run.pk)] == [None]
    run.append(1, 0, [*first[:3], {"n": 7, "phase": "lunch"}], stream=PHASES)
    run.append(1, 0, first[2:], stream=PHASES, writer="v")  # whose lines stand before those of `w`
    run.append(1, 0, [{"system.cpu": 1.0, "_timestamp": 150.0}], stream=EVENTS)
    (alone,) = store.attempts(run.pk)
    assert alone.phases == {**ZERO, "queued": 0, "down": 0, "lost": 0, "startup": 12, "train": 37, "save": 1}
    assert alone.lost_seconds == 0

    run.begin(2, cut(1, 5), now=175.0)  # killed before its first mark
    run.begin(3, cut(1, 5), now=190.0)
    third = mark(0, 195, "startup", startup=5)
    run.append(3, 0, [third, mark(1, 200, "end", 9, startup=6, train=4)], stream=PHASES)
    told = store.attempts(run.pk)
    assert [attempt.lost_seconds for attempt in told] == [17, 0, 0]
    assert told[0].phases == {**alone.phases, "train": 20, "lost": 17}
    assert [attempt.phases["down"] for attempt in told if attempt.phases] == [0, pytest.approx(25), pytest.approx(15)]
    total = goodput(attempt.phases for attempt in told if attempt.phases)
    assert total is not None
    assert (total.seconds, total.share, total.attempts) == (pytest.approx(100), pytest.approx(0.24), 3)
    assert run.steps() == [0, 1, 2, 3, 4]
    assert "startup" not in run.row.summary


def test_an_attempt_with_many_saves(store: SqlStore) -> None:
    """Proves that of many marks those that matter are found: the first, the last, the kept save, a late submission."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(200)))
    marks = [mark(0, 110, "train", startup=10)]
    for step in range(1, 200):
        spent = {"startup": 10, "train": 2.0 * step, "save": 0.5 * (step - 1)}
        marks.append(mark(2 * step - 1, 110 + 2.5 * step - 0.5, "save", step, **spent))
        marks.append(mark(2 * step, 110 + 2.5 * step, "train", step, **{**spent, "save": 0.5 * step}))
    marks[301]["submitted"] = 90.0
    for at in range(0, len(marks), 50):
        run.append(1, at, marks[at : at + 50], stream=PHASES)
    run.begin(2, cut(1, 120), now=1000.0)
    first, second = (attempt.phases for attempt in store.attempts(run.pk))
    assert first == {**ZERO, "queued": 10, "down": 0, "startup": 10, "train": 240, "lost": 158, "save": 99.5}
    assert second is not None
    assert second["down"] == pytest.approx(1000 - 607.5)


def test_a_fork_has_the_time_of_its_own_attempts(store: SqlStore) -> None:
    """Proves that an attempt which is built on another run takes nothing for lost that is not its run's."""
    source = StoredRun(store, "source")
    source.begin(1)
    source.append(1, 0, rows(range(5)))
    source.append(
        1, 0, [mark(0, 120, "train", startup=10, train=10), mark(1, 130, "end", 5, startup=10, train=20)], stream=PHASES
    )
    fork = StoredRun(store, "fork")
    store.begin_attempt(fork.pk, BeginAttempt(1, "n1", "w", cut(1, 3), base_run="source"), 1000.0)
    fork.append(1, 0, [mark(0, 510, "end", 5, startup=5, train=5)], stream=PHASES)
    (attempt,) = store.attempts(fork.pk)
    assert attempt.phases is not None
    assert (sum(attempt.phases.values()), attempt.phases["train"], attempt.lost_seconds) == (10, 5, 0)
    assert [attempt.lost_seconds for attempt in store.attempts(source.pk)] == [0]
    store.begin_attempt(fork.pk, BeginAttempt(2, "n2", "w", cut(1, 3), base_run="source"), 1100.0)
    assert [attempt.lost_seconds for attempt in store.attempts(fork.pk)] == [5, 0]
