"""Charts, ranges and tails against the plain rows, across chunks of every size and views that cut through them."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import sqlalchemy as sa
from support.storing import NOW, StoredRun, cut, rows

from wbdist.core.position import CONSOLE, HISTORY
from wbdist.errors import UsageError
from wbdist.server.store import SqlStore, chunks, reading, rollups
from wbdist.server.store.interface import Bucket


def check_chart(found: list[Bucket], points: list[tuple[int, float]], most: int) -> None:
    """Buckets in order that hold every point once, with the true figures of the points that they hold."""
    assert len(found) <= most
    rest = list(points)
    for bucket in found:
        part, rest = rest[: bucket.count], rest[bucket.count :]
        assert (bucket.lo, bucket.hi, bucket.last) == (part[0][0], part[-1][0], part[-1][1])
        values = [value for _, value in part]
        assert (bucket.min, bucket.max) == (min(values), max(values))
        assert bucket.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert rest == []


@pytest.mark.parametrize("buckets", [1, 7, 100, 10_000])
def test_charts_hold_every_live_value_once(store: SqlStore, tiny: None, buckets: int) -> None:
    """Rollups, whole chunks, a chunk that the base cuts, single appends: the chart is that of the live rows alone."""
    randomness = random.Random(buckets)
    run = StoredRun(store)
    live: list[dict[str, Any]] = []
    for attempt, base, kept in ((1, None, 0), (2, cut(1, 101), 101), (3, cut(2, 50), 151)):
        run.begin(attempt, base)
        live = live[:kept]
        first = live[-1]["_step"] + 1 if live else 0
        lines = rows(range(first, first + 150), loss=lambda _: randomness.uniform(-1, 1), other="text")
        at = 0
        while at < len(lines):
            size = randomness.choice([1, 1, 2, 5, 40])
            run.append(attempt, at, lines[at : at + size])
            at += size
        live += lines
    points = [(row["_step"], row["loss"]) for row in live]
    check_chart(store.series(run.pk, "loss", buckets=buckets), points, buckets)
    assert store.series(run.pk, "other") == []
    assert store.series(run.pk, "unknown") == []
    assert run.history() == live


def test_a_chart_of_many_steps_comes_from_rollups(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long metric is drawn without reading its values, and as exactly; NaN counts, but takes no part in the figures."""
    monkeypatch.setattr(chunks, "SEAL_ROWS", 4096)
    run = StoredRun(store)
    count = 3 * 4096 + 5
    value = [math.nan if s % 1000 == 999 else math.sin(s / 100) + s % 7 for s in range(count)]
    for at in range(0, count, 512):
        run.append(None, at, rows(range(at, min(at + 512, count)), v=value.__getitem__))
    read: list[int] = []
    monkeypatch.setattr(rollups.Blocks, "of_values", _counting(rollups.Blocks.of_values, read))
    found = store.series(run.pk, "v", buckets=10)
    assert sum(read) < 4096
    assert sum(bucket.count for bucket in found) == count
    at = 0
    for bucket in found:
        part = [v for v in value[at : at + bucket.count] if not math.isnan(v)]
        assert (bucket.lo, bucket.hi) == (at, at + bucket.count - 1)
        assert (bucket.min, bucket.max) == (min(part), max(part))
        assert bucket.mean == pytest.approx(math.fsum(part) / len(part))
        at += bucket.count
    assert len(found) == 10


def _counting(original: Any, read: list[int]) -> Any:
    def of_values(steps: Any, values: Any) -> Any:
        read.append(len(steps))
        return original(steps, values)

    return of_values


def test_steps_that_run_back_are_drawn_by_step(store: SqlStore, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer whose steps begin again: buckets do not overlap, nothing is lost."""
    monkeypatch.setattr(rollups, "WIDTH", 4)
    monkeypatch.setattr(reading, "_RAW", 8)
    run = StoredRun(store)
    run.begin(1)
    steps = [*range(40), *range(2, 42)]
    for at in range(0, 80, 5):
        run.append(1, at, rows(steps[at : at + 5], v=float))
    points = sorted((s, float(s)) for s in steps)
    for buckets in (1, 3, 8, 500):
        check_chart(store.series(run.pk, "v", buckets=buckets), points, buckets)
    assert run.steps() == steps


def test_values_that_are_no_finite_numbers(store: SqlStore) -> None:
    """NaN alone is a NaN bucket, infinities are figures, text and booleans and nested values are not drawn."""
    run = StoredRun(store)
    values: list[Any] = [math.nan, math.inf, -math.inf, True, "x", None, {"a": 1}, 10**400, 2]
    run.append(None, 0, [{"_step": i, "v": value} for i, value in enumerate(values)])
    found = store.series(run.pk, "v")
    assert [b.lo for b in found] == [0, 1, 2, 7, 8]
    assert [repr(b.mean) for b in found] == ["nan", "inf", "-inf", "inf", "2.0"]
    whole = store.series(run.pk, "v", buckets=1)
    assert [(b.count, b.min, b.max, b.last) for b in whole] == [(5, -math.inf, math.inf, 2.0)]


def test_ranges_keys_and_limits(store: SqlStore, tiny: None) -> None:
    """[min_step, max_step), rows that have all keys, the first `limit` of them, whatever chunks they lie in."""
    run = StoredRun(store)
    lines = [{"_step": s, "a": s} | ({"b": -s} if s % 3 == 0 else {}) for s in range(0, 120, 2)]
    for at in range(0, 60, 3):
        run.append(None, at, lines[at : at + 3])
    for low, high in ((0, None), (0, 10), (31, 90), (200, None), (7, 8)):
        expected = [row for row in lines if row["_step"] >= low and (high is None or row["_step"] < high)]
        assert run.history(min_step=low, max_step=high) == expected
        assert run.history(min_step=low, max_step=high, limit=4) == expected[:4]
        both = [{"b": row["b"], "_step": row["_step"]} for row in expected if "b" in row]
        assert run.history(keys=["b", "_step"], min_step=low, max_step=high) == both
        assert run.history(keys=["b", "_step"], min_step=low, max_step=high, limit=2) == both[:2]
    assert run.history(keys=["nothing"]) == []
    assert run.history(limit=0) == []


def test_rows_without_a_step(store: SqlStore) -> None:
    """They belong to the whole history in their place, to no range, and to no chart."""
    run = StoredRun(store)
    lines = [{"_step": 5, "v": 1}, {"v": 2}, {"_step": "six", "v": 3}, {"_step": -7, "v": 4}, {"_step": 8.0, "v": 5}]
    run.append(None, 0, lines)
    assert run.history() == lines
    assert run.history(min_step=1) == [lines[0], lines[4]]
    assert run.history(max_step=100) == [lines[0], lines[4]]
    assert [b.last for b in store.series(run.pk, "v")] == [1, 5]
    assert run.row.last_step == 8


def test_writers_of_one_attempt_are_merged_by_step(store: SqlStore, tiny: None) -> None:
    """Two writers with steps of their own: one history by step, each one's rows in their order."""
    run = StoredRun(store)
    run.begin(1)
    for at in range(0, 20, 4):
        run.append(1, at, rows(range(2 * at, 2 * at + 8, 2), who="even"), writer="b")
    for at in range(0, 20, 5):
        run.append(1, at, rows(range(2 * at + 1, 2 * at + 11, 2), who="odd"), writer="a")
    assert run.steps() == list(range(40))
    assert run.steps(min_step=7, max_step=30, limit=5) == [7, 8, 9, 10, 11]
    tail = store.history_tail(run.pk, HISTORY)
    assert tail == {"_step": 39, "who": "odd"}


def test_small_appends_leave_few_chunks(store: SqlStore, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 appends of one row to each of two runs by turns: a few chunks a run, in levels, and the same rows."""
    monkeypatch.setattr(chunks, "FAN", 8)
    first, second = StoredRun(store, "one"), StoredRun(store, "two")
    for at in range(400):
        for run in (first, second):
            run.append(None, at, [{"_step": at, "v": at * 0.5}])
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as db:
        sizes = db.execute(
            sa.text("SELECT run_pk, count(*) AS chunks, max(seq_hi - seq_lo) AS largest FROM chunks GROUP BY run_pk")
        ).all()
    engine.dispose()
    assert {row.run_pk for row in sizes} == {first.pk, second.pk}
    assert all(row.chunks < 24 and row.largest >= 64 for row in sizes)
    assert first.history() == second.history() == [{"_step": s, "v": s * 0.5} for s in range(400)]


def test_a_page_of_the_console_far_down(store: SqlStore) -> None:
    """Any window of lines is found by position, over attempts and writers."""
    run = StoredRun(store)
    run.begin(1)
    lines = [f"line {i}" for i in range(500)]
    run.append(1, 0, lines, stream=CONSOLE)
    run.begin(2, cut(1, 400, stream=CONSOLE))
    run.append(2, 0, ["x", "y"], stream=CONSOLE)
    shown = [*lines[:400], "x", "y"]
    assert store.console(run.pk, first=395, limit=6) == shown[395:401]
    assert store.console(run.pk, first=401) == ["y"]
    assert store.console(run.pk, first=0, limit=0) == []
    assert store.console(run.pk, limit=1000) == shown


def test_reading_nothing(store: SqlStore) -> None:
    """An unknown run, an empty run, an unknown attempt: empty answers, not errors; senseless questions are refused."""
    run = StoredRun(store)
    for pk in (run.pk, 4711):
        assert store.history(pk) == store.series(pk, "v") == store.console(pk) == store.attempts(pk) == []
        assert store.history_tail(pk, HISTORY) is None
    run.append(None, 0, [json.dumps({"_step": 0, "v": 1})])
    assert run.history(attempt=5) == []
    with pytest.raises(UsageError, match="at least 1 bucket"):
        store.series(run.pk, "v", buckets=0)
    with pytest.raises(UsageError, match="give attempt too"):
        store.history(run.pk, nonce="x")
    with pytest.raises(ValueError, match="must not be negative"):
        store.append(run.pk, {HISTORY: (-1, ["{}"])}, NOW)


@pytest.mark.parametrize("raw", [1, 256], ids=["rollups", "values"])
def test_many_metrics_are_read_together(store: SqlStore, tiny: None, monkeypatch: pytest.MonkeyPatch, raw: int) -> None:
    """Proves that the charts of all keys of a wide run are those of each alone, whatever its rows have of them, and that chunks
    are looked over a few times for all: once for each key held the server up for 15 s with a run of 3,000 keys."""
    monkeypatch.setattr(reading, "_RAW", raw)
    run = StoredRun(store)
    run.begin(1)
    lines = [
        {"_step": step, "all": step, "odd": str(step) if step % 3 else step, "words": "x"}
        | {f"k{key}": key * step for key in range(100) if (key + step) % 7}
        for step in range(60)
    ]
    for at in range(0, 60, 20):
        run.append(1, at, lines[at : at + 20])
    keys = ["all", "odd", "words", "nowhere", *(f"k{key}" for key in range(100)), "_step"]
    alone = {key: store.series(run.pk, key, buckets=5) for key in keys}
    assert sum(bucket.count for bucket in alone["odd"]) == 20
    loads: list[object] = []
    load_many = reading.load_many
    monkeypatch.setattr(reading, "load_many", lambda *given: loads.append(given) or load_many(*given))
    assert store.many_series(run.pk, keys, buckets=5) == {key: found for key, found in alone.items() if found}
    assert len(loads) <= 3
    monkeypatch.setattr(reading, "_HELD", 600)  # of a long run, not all at once
    del loads[:]
    assert store.many_series(run.pk, keys, buckets=5).keys() == {key for key, found in alone.items() if found}
    assert max(len(given[2]) for given in loads) <= 600 // min(60, 5 * raw) + 1  # type: ignore[index]
    assert store.many_series(run.pk, [], buckets=5) == {}
