"""The store alone: `python benchmarks/store.py [--rows N] [--url URL]`.

What comes in and what is asked, without HTTP: posts of 100 rows x 10 metrics to one run up to a million rows, its charts, a cut
in the middle, posts of one row, eight threads, a wide run of 1000 metrics. A plain SQLite table of one row a value is the
floor that a simple design reaches. Prints a table; goals are marked. Every figure is of this process alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from wbdist.core.position import HISTORY, Watermark
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import SqlStore, open_store
from wbdist.server.store.interface import RunFields

POST = 100
METRICS = 10


def post(first: int, rows: int, metrics: int) -> list[str]:
    """Lines as a client sends them: half smooth curves, half noise, of values that were float32."""
    out = []
    for step in range(first, first + rows):
        values = {f"m{k}": math.exp(-step / 3e5) if k % 2 else random.random() for k in range(metrics - 1)}
        out.append(json.dumps({"_step": step, "_timestamp": 1.7e9 + step * 0.01, **values}))
    return out


def timed(call: Callable[[], object], times: int = 5) -> float:
    """Median milliseconds, warm."""
    call()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append((time.perf_counter() - start) * 1e3)
    return statistics.median(took)


def line(what: str, value: str, goal: str = "") -> None:
    print(f"{what:<66} {value:>24}   {goal}", flush=True)


def ingest(store: SqlStore, rows: int) -> int:
    """One run of `rows` rows; prints rates by tenth, to show that they do not fall."""
    run, _ = store.upsert_run("bench", "store", "long", RunFields(), 1.0)
    store.begin_attempt(run.pk, BeginAttempt(1, "n", "w"), 1.0)
    took: list[float] = []
    for first in range(0, rows, POST):
        lines = post(first, POST, METRICS)
        start = time.perf_counter()
        store.append(run.pk, {HISTORY: (first, lines)}, 1.0, attempt=1, nonce="n", writer="w")
        took.append(time.perf_counter() - start)
    per_post = POST * METRICS
    tenth = max(1, len(took) // 10)
    rates = [per_post * tenth / sum(took[at : at + tenth]) for at in (0, len(took) - tenth)]
    line(
        f"ingest, {rows:,} rows x {METRICS} in posts of {POST}",
        f"{per_post * len(took) / sum(took):,.0f} values/s",
        ">= 167,000",
    )
    line("  first tenth, last tenth", f"{rates[0]:,.0f}, {rates[1]:,.0f}", "constant")
    ordered = sorted(took)
    figures = [ordered[len(took) // 2], ordered[int(len(took) * 0.99)], ordered[-1]]
    line("  one post: p50, p99, max", ", ".join(f"{t * 1e3:.1f}" for t in figures) + " ms")
    return run.pk


def small_posts(store: SqlStore, rows: int) -> None:
    run, _ = store.upsert_run("bench", "store", "small", RunFields(), 1.0)
    lines = [post(step, 1, METRICS) for step in range(rows)]
    start = time.perf_counter()
    for step, one in enumerate(lines):
        store.append(run.pk, {HISTORY: (step, one)}, 1.0)
    took = time.perf_counter() - start
    line(f"ingest, {rows:,} rows in posts of one row", f"{rows / took:,.0f} posts/s")
    line("  its chart, 1000 buckets", f"{timed(lambda: store.series(run.pk, 'm0')):.1f} ms", "< 50 ms")


def threads(store: SqlStore, posts: int) -> None:
    pks = [store.upsert_run("bench", "store", f"t{k}", RunFields(), 1.0)[0].pk for k in range(8)]
    lines = [post(n * POST, POST, METRICS) for n in range(posts)]

    def work(pk: int) -> None:
        for n, one in enumerate(lines):
            store.append(pk, {HISTORY: (n * POST, one)}, 1.0)

    workers = [threading.Thread(target=work, args=(pk,)) for pk in pks]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - start
    line("ingest, 8 threads, a run each", f"{8 * posts * POST * METRICS / took:,.0f} values/s", ">= 167,000")


def wide(store: SqlStore, rows: int) -> None:
    run, _ = store.upsert_run("bench", "store", "wide", RunFields(), 1.0)
    took = 0.0
    for first in range(0, rows, 50):
        lines = post(first, 50, 1000)
        start = time.perf_counter()
        store.append(run.pk, {HISTORY: (first, lines)}, 1.0)
        took += time.perf_counter() - start
    line(f"ingest, {rows:,} rows x 1000 in posts of 50", f"{rows * 1000 / took:,.0f} values/s")
    line("  chart of one of its metrics", f"{timed(lambda: store.series(run.pk, 'm7')):.1f} ms", "< 50 ms")


def plain_table(rows: int, directory: Path) -> None:
    """The floor: the same values as one SQL row each, one transaction a post, and the chart by GROUP BY."""
    with sqlite3.connect(directory / "plain.db", isolation_level=None) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE points (key TEXT, step INTEGER, value REAL, PRIMARY KEY (key, step)) WITHOUT ROWID")
        took = 0.0
        for first in range(0, rows, POST):
            lines = post(first, POST, METRICS)
            start = time.perf_counter()
            db.execute("BEGIN IMMEDIATE")
            for row in map(json.loads, lines):
                db.executemany(
                    "INSERT INTO points VALUES (?, ?, ?)", [(key, row["_step"], value) for key, value in row.items()]
                )
            db.execute("COMMIT")
            took += time.perf_counter() - start
        line(f"floor: one SQL row a value, {rows:,} rows: ingest", f"{rows * METRICS / took:,.0f} values/s")
        chart = (
            f"SELECT step / {max(1, rows // 1000)}, min(value), max(value), avg(value) FROM points WHERE key = 'm0' GROUP BY 1"
        )
        line("  its chart, 1000 buckets", f"{timed(lambda: db.execute(chart).fetchall()):.1f} ms")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    line("  on disk", f"{(directory / 'plain.db').stat().st_size / rows / (METRICS + 1):.1f} B/value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--url", help="an empty database instead of a SQLite file, e.g. postgresql://user@host/name")
    parser.add_argument("--durable", action="store_true", help="synchronous=FULL")
    arguments = parser.parse_args()
    random.seed(1)
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="wbdist-bench-") as name:
        path = Path(name) / "store.db"
        url = arguments.url or f"sqlite:///{path}"
        store = open_store(url, durable=arguments.durable)
        pk = ingest(store, arguments.rows)
        line("chart, 1000 buckets, from rollups", f"{timed(lambda: store.series(pk, 'm0')):.1f} ms", "< 50 ms")
        line("  8000 buckets, from the values", f"{timed(lambda: store.series(pk, 'm0', buckets=8000), 3):.1f} ms")
        middle = arguments.rows // 2
        line(
            "rows [middle, middle + 1000)",
            f"{timed(lambda: store.history(pk, min_step=middle, max_step=middle + 1000)):.1f} ms",
        )
        line("last row", f"{timed(lambda: store.history_tail(pk, HISTORY)):.1f} ms")
        if not arguments.url:
            store.close()
            line("on disk", f"{path.stat().st_size / arguments.rows / (METRICS + 1):.1f} B/value")
            store = open_store(url, durable=arguments.durable)
        start = time.perf_counter()
        base = Watermark(1, {HISTORY: {"w": middle + 123}}, middle + 122)
        store.begin_attempt(pk, BeginAttempt(2, "n2", "w", base), 2.0)
        line("a new attempt at the middle of it", f"{(time.perf_counter() - start) * 1e3:.1f} ms", "< 100 ms")
        line("  the chart of the cut view", f"{timed(lambda: store.series(pk, 'm0')):.1f} ms", "< 50 ms")
        small_posts(store, min(10_000, arguments.rows))
        threads(store, max(10, arguments.rows // 20_000))
        wide(store, max(50, arguments.rows // 500))
        store.close()
        plain_table(min(100_000, arguments.rows), Path(name))


if __name__ == "__main__":
    main()
