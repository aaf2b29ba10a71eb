"""Who is slow: the judgement alone, its exchange among ranks, and real DDP with an injected delay."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import ThreadCoordinator, run_ranks
from support.torchrun import torchrun

from wbdist.hooks.stragglers import KEPT, WARN_AFTER, WINDOW, StragglerWatch, Verdict, judge

PROGRAM = Path(__file__).parent / "programs" / "straggling.py"


def waits_of(arrivals: list[list[float]], reduction: float) -> list[list[float]]:
    """Each rank's waits, of when the ranks came to the passes: the reduction begins with the last."""
    ends = [max(at_once) + reduction for at_once in zip(*arrivals, strict=True)]
    return [[end - came for end, came in zip(ends, own, strict=True)] for own in arrivals]


@given(
    ranks=st.integers(2, 16),
    seed=st.integers(0, 2**32),
    delay=st.floats(5.0, 50.0),
    jitter=st.floats(0.0, 2.0),
    reduction=st.floats(0.1, 300.0),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_a_slow_rank_is_named_and_none_else(ranks: int, seed: int, delay: float, jitter: float, reduction: float) -> None:
    """Proves the judgement for any number of ranks, any cost of the reduction, and steps that hiccup now and then."""
    source = random.Random(seed)
    slow = source.randrange(ranks)

    def arrivals(late: float) -> list[list[float]]:
        return [
            [source.gauss(100.0 + late * (rank == slow), jitter) + (source.random() < 0.05) * 40.0 for _ in range(WINDOW)]
            for rank in range(ranks)
        ]

    verdict = judge(waits_of(arrivals(delay), reduction))
    assert (verdict.rank, verdict.named) == (slow, True)
    assert verdict.late_ms == pytest.approx(delay, abs=1.0 + 3 * jitter)
    assert not judge(waits_of(arrivals(0.0), reduction)).named


def test_a_person_is_told_once_and_again_after_it_was_well() -> None:
    """Proves the exchange over a coordinator: windows judged on rank 0, the warning after some in a row, and only then."""

    def rank(peers: ThreadCoordinator) -> tuple[list[str], list[Verdict], list[dict[str, float]]]:
        said: list[str] = []
        verdicts: list[Verdict] = []
        rows: list[dict[str, float]] = []
        watch = StragglerWatch(peers, "model", f"host{peers.rank}", said.append, verdicts.append)
        for number, slow in enumerate([2] * 5 + [None] * 4 + [2] * 4):
            for _ in range(WINDOW):
                rows.append(dict(watch.waited(1.0 if peers.rank == slow or slow is None else 11.0)))
            deadline = time.monotonic() + 30
            while peers.rank == 0 and len(verdicts) <= number and time.monotonic() < deadline:
                time.sleep(0.001)
            peers.barrier(str(number), 30)
        rows.append(dict(watch.waited(1.0)))
        watch.close()
        return said, verdicts, [row for row in rows if row]

    (said, verdicts, rows), *others = run_ranks(3, rank, 60)
    assert [verdict.window for verdict in verdicts] == list(range(13))
    assert [verdict.rank if verdict.named else -1 for verdict in verdicts] == [2] * 5 + [-1] * 4 + [2] * 4
    assert [row["ddp/straggler"] for row in rows] == [2] * 5 + [-1] * 4 + [2] * 4
    assert len(said) == 2
    assert "rank 2 on host2 is slower" in said[0]
    assert f"last {WARN_AFTER * WINDOW} steps they were ready 10.0 ms before it" in said[0]
    assert all(other == ([], [], []) for other in others)


def test_a_rank_that_joined_early_holds_nobody_up() -> None:
    """Proves that a rank which hands in no more windows costs the others nothing, and that leaving takes no time."""

    def rank(peers: ThreadCoordinator) -> float:
        watch = StragglerWatch(peers, "model", "host", lambda text: None)
        for _ in range(WINDOW * KEPT * 3 if peers.rank == 0 else 0):
            watch.waited(1.0)
        started = time.monotonic()
        watch.close()
        return time.monotonic() - started

    assert all(seconds < 2.0 for seconds in run_ranks(2, rank))


def trials(ranks: int, seed: int, windows: int, share: float, tmp_path: Path) -> tuple[int, int, int, int]:
    """(windows with a slow rank, of these named right, without, of these with a false alarm)"""
    torchrun(ranks, PROGRAM, tmp_path, seed, windows, share, cwd=tmp_path, timeout=600)
    found = json.loads((tmp_path / "report.json").read_text())["windows"]
    slow = [trial for trial in found if trial["injected"][0] >= 0]
    right = [trial for trial in slow if trial["found"] and trial["found"][2] and trial["found"][0] == trial["injected"][0]]
    well = [trial for trial in found if trial["injected"][0] < 0]
    return len(slow), len(right), len(well), sum(bool(trial["found"] and trial["found"][2]) for trial in well)


def test_an_injected_delay_is_named(tmp_path: Path) -> None:
    """Proves it with real DDP over real processes, whichever rank it is (rank 0's is hidden in a broadcast of buffers)."""
    slow, right, _, _ = trials(2, 1, 6, 1.0, tmp_path)
    assert (slow, right) == (6, 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "windows"), [(2, 200), (4, 300), (8, 60)])
def test_injected_delays_of_5_to_50_ms(ranks: int, windows: int, tmp_path: Path) -> None:
    """Proves 99 % over hundreds of random ranks and delays, and no false alarm where none is slow."""
    slow, right, well, false = trials(ranks, 7, windows, 0.7, tmp_path)
    assert right >= 0.99 * slow, f"{right} of {slow}"
    assert false <= 0.01 * well, f"{false} false alarms in {well} windows"
