"""When to save: every rank gives the same answer, at about the right time, and hardly ever asks."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from support.ranks import ThreadCoordinator, alone, run_ranks

import wbdist
from wbdist.checkpoint.manifest import committed
from wbdist.checkpoint.policy import PRIOR_MTBF, Cost, SavePolicy, Schedule, best_interval, observed_mtbf
from wbdist.errors import UsageError


def test_what_may_be_given() -> None:
    """Steps, times in words, auto; anything else is refused with what is allowed."""
    assert SavePolicy.parse(50) == SavePolicy.parse("50 steps") == SavePolicy(steps=50)
    assert SavePolicy.parse("1 step") == SavePolicy(steps=1)
    assert SavePolicy.parse("90 s") == SavePolicy.parse("1.5 minutes") == SavePolicy(seconds=90.0)
    assert SavePolicy.parse("2 hours") == SavePolicy(seconds=7200.0)
    assert (SavePolicy.parse("auto"), SavePolicy.parse(None)) == (SavePolicy(), None)
    for bad in (0, -1, True, "often", "1.5 steps", "10 days", "0 s", ""):
        with pytest.raises(UsageError, match="is not understood"):
            SavePolicy.parse(bad)


class Counting(ThreadCoordinator):
    """Counts what is asked of the store."""

    asked = 0

    def agree(self, name: str, value: bytes | None, timeout: float) -> bytes:
        self.asked += 1
        return super().agree(name, value, timeout)


def test_every_rank_says_the_same() -> None:
    """Three ranks whose clocks have nothing to do with each other save after the same steps; most steps ask nobody."""

    def act(coordinator: ThreadCoordinator) -> tuple[list[int], int]:
        counting = Counting(coordinator.board, coordinator.rank, 3)
        noise = random.Random(coordinator.rank)
        now = [noise.random() * 1e6]
        schedule = Schedule(SavePolicy(seconds=100.0), counting, lambda: PRIOR_MTBF, lambda: now[0])
        saved = []
        for step in range(1, 5001):
            now[0] += 0.1 * (1 + noise.random())
            if schedule.due(step, Cost(), 20):
                saved.append(step)
        return saved, counting.asked

    answers = run_ranks(3, act)
    assert all(answer == answers[0] for answer in answers)
    saved, asked = answers[0]
    # 5000 steps of 0.15 s: a save each 667 or so.
    assert 6 <= len(saved) <= 8
    assert asked < 5000 / 20


def test_times_are_kept_when_steps_slow_down() -> None:
    """A loop that becomes a hundred times slower is saved about as often as it was asked to be."""
    now = [0.0]
    schedule = Schedule(SavePolicy(seconds=60.0), alone(), lambda: PRIOR_MTBF, lambda: now[0])
    saved = [0.0]
    for step in range(1, 2000):
        now[0] += 0.05 if step < 1500 else 5.0
        if schedule.due(step, Cost(), 1):
            saved.append(now[0])
    gaps = [after - before for before, after in itertools.pairwise(saved)]
    assert len(gaps) > 30
    assert sum(gap > 75 for gap in gaps) <= 1  # the one during which it slowed down
    assert min(gaps) > 45


def test_auto_follows_what_is_measured() -> None:
    """The time between saves is the best one for what saves cost and how often the job fails, and changes with both."""
    now, cost, mtbf = [0.0], Cost(2.0), [3600.0]
    schedule = Schedule(SavePolicy(), alone(), lambda: mtbf[0], lambda: now[0])
    step = itertools.count(1)

    def gap() -> float:
        """Of the third save from here on: the first one's interval began before."""
        times: list[float] = []
        while len(times) < 3:
            now[0] += 0.5
            if schedule.due(next(step), cost, 1):
                times.append(now[0])
        return times[2] - times[1]

    assert gap() == pytest.approx(best_interval(cost, 3600.0), abs=2)
    cost = Cost(8.0)
    assert gap() == pytest.approx(best_interval(cost, 3600.0), abs=2)
    mtbf[0] = 400.0
    assert gap() == pytest.approx(best_interval(cost, 400.0), abs=2)
    assert best_interval(cost, 400.0) < best_interval(Cost(2.0), 3600.0) < best_interval(cost, 3600.0)


def test_the_interval_that_loses_the_least(tmp_path: Path) -> None:
    """Dear saves come less often, failures bring them closer; what is lost is least at the interval that is chosen."""
    assert best_interval(Cost(4.0), 3600) > best_interval(Cost(1.0), 3600) > best_interval(Cost(1.0), 900)
    assert best_interval(Cost(0.001, total_s=30), 60) == 60.0

    def lost(interval: float, cost: float, mtbf: float) -> float:
        return cost / interval + (interval + cost) / (2 * mtbf)

    chosen = best_interval(Cost(2.0), 3600)
    assert lost(chosen, 2.0, 3600) <= 1.01 * min(lost(each, 2.0, 3600) for each in range(10, 2000))
    assert observed_mtbf(tmp_path) == PRIOR_MTBF
    (tmp_path / "attempts").mkdir()
    for number in range(1, 11):
        life = {"number": number, "nonce": "n", "started_at": 1000.0 * number, "host": "h", "pid": 1, "cause": "restart"}
        (tmp_path / "attempts" / f"{number:06d}.json").write_text(json.dumps(life))
    assert observed_mtbf(tmp_path, lambda: 11000.0) == pytest.approx((PRIOR_MTBF + 10000) / 10)


def test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wbdist.checkpoints` without a job: claims the directory, saves when due, restores in the next life."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    model = torch.nn.Linear(2, 2)
    with wbdist.checkpoints(tmp_path, save_every="3 steps") as saved:
        saved.track(model=model)
        assert saved.restore() is None
        for step in range(1, 8):
            torch.nn.init.constant_(model.weight, step)
            saved.maybe_save(step)
        assert saved.save(7, block=True, timeout=20).durable_at is not None
    assert [manifest.step for manifest in committed(tmp_path)] == [7, 6]
    with wbdist.checkpoints(tmp_path) as saved:
        saved.track(model=model)
        torch.nn.init.zeros_(model.weight)
        restored = saved.restore()
        assert restored is not None
        assert (restored.step, restored.attempt) == (7, 1)
        assert model.weight.unique().tolist() == [7.0]
        assert not saved.due(9)
