"""What the server's store takes in, gives back and occupies; against the layouts one would write first.

    python benchmarks/store.py [--rows 1000000] [--batch 100] [--http 50000] [--url postgresql://...] [--json]

One run of 10 float metrics (as `loss.item()` gives them: float32 in a float64) beside `_step`, `_timestamp` and `_runtime`;
a *value* is one metric of one row, the three internal ones are not counted. Lines are made beforehand and not timed.

- `wbdist`: `SqlStore.append`, the whole of it: parse, compress, one transaction; then reads of what that left.
- `row per value`: SQLite (WAL, synchronous=NORMAL), a table (run, key, step, value), one transaction an append. What many
  trackers do.
- `line per row`: the same with one row of JSON text a line: nothing is parsed, so a chart must.
- `parse`: the floor of any server that looks into its lines: msgspec alone, nothing stored.
- `http`: the wbdist server as a process of its own, one client that waits for each answer.

`first` and `last` are the first and the last tenth of the run: a store whose appends cost more as the run grows shows here.
CPU seconds are the process's own; on a shared machine trust them before the wall clock.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common.serving import Server

from wbdist.core.position import HISTORY, Watermark
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import SqlStore, open_store
from wbdist.server.store.engine import sqlite_module
from wbdist.server.store.interface import RunFields

KEYS = [f"train/metric_{number}" for number in range(10)]
BLOCK = 10_000
"""Rows made at a time, so that memory stays small whatever --rows is."""
BUCKETS = 1000


def lines_of(first: int, count: int) -> list[str]:
    """History lines as a client sends them; the same for the same numbers."""
    noise = np.random.default_rng(first).random((count, len(KEYS)), dtype=np.float32)
    curve = 1 / np.sqrt(1 + np.arange(first, first + count, dtype=np.float32))
    values = (noise * 0.1 + curve[:, None]).astype(np.float64)
    out = []
    for step, row in enumerate(values.tolist(), first):
        line = dict(zip(KEYS, row, strict=True))
        out.append(json.dumps({**line, "_step": step, "_timestamp": 1.7e9 + step * 0.013, "_runtime": step * 0.013}))
    return out


def batches(rows: int, size: int, first: int = 0) -> Iterator[tuple[int, list[str]]]:
    for block in range(first, first + rows, BLOCK):
        lines = lines_of(block, min(BLOCK, first + rows - block))
        for at in range(0, len(lines), size):
            yield block + at, lines[at : at + size]


def ingest(append: Callable[[int, list[str]], object], rows: int, size: int, first: int = 0) -> dict[str, float]:
    """Feeds `append` and measures it alone."""
    took, cpu = [], 0.0
    for seq, lines in batches(rows, size, first):
        cpu_before, before = time.process_time(), time.perf_counter()
        append(seq, lines)
        took.append(time.perf_counter() - before)
        cpu += time.process_time() - cpu_before
    tenth = max(1, len(took) // 10)
    ordered = sorted(took)
    per = size * len(KEYS)
    return {
        "values_s": rows * len(KEYS) / sum(took),
        "first": per * tenth / sum(took[:tenth]),
        "last": per * tenth / sum(took[-tenth:]),
        "values_cpu_s": rows * len(KEYS) / cpu,
        "p50_ms": statistics.median(took) * 1e3,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
        "max_ms": ordered[-1] * 1e3,
    }


def milliseconds(call: Callable[[], Any], repeat: int = 9) -> float:
    """Median, warm."""
    call()
    took = []
    for _ in range(repeat):
        before = time.perf_counter()
        call()
        took.append(time.perf_counter() - before)
    return statistics.median(took) * 1e3


# wbdist -------------------------------------------------------------------------------------------------


def new_run(store: SqlStore, name: str) -> int:
    run, _ = store.upsert_run("bench", "store", name, RunFields(), 1.0)
    store.begin_attempt(run.pk, BeginAttempt(1, "nonce", "rank0"), 1.0)
    return run.pk


def into(store: SqlStore, pk: int, attempt: int = 1) -> Callable[[int, list[str]], object]:
    def append(seq: int, lines: list[str]) -> None:
        done = store.append(pk, {HISTORY: (seq, lines)}, 2.0, attempt=attempt, nonce="nonce", writer="rank0")
        assert done.code == "", done

    return append


def run_wbdist(place: Path, rows: int, size: int, url: str | None) -> tuple[dict[str, float], dict[str, float]]:
    """Ingest of the long run, and everything else that was measured on it."""
    store = open_store(url or f"sqlite:///{place / 'store.db'}")
    pk = new_run(store, f"long-{random.getrandbits(48):x}")
    table = ingest(into(store, pk), rows, size)
    if url is None:
        table["bytes_value"] = bytes_of(place) / (rows * len(KEYS))
    table["chart_ms"] = milliseconds(lambda: store.series(pk, KEYS[3], buckets=BUCKETS))
    middle = rows // 2 + 17
    numbers = {
        "chart of 10 metrics, ms": milliseconds(lambda: [store.series(pk, key, buckets=BUCKETS) for key in KEYS]),
        "page of 1000 rows in the middle, ms": milliseconds(lambda: store.history(pk, min_step=middle, limit=1000)),
        "page of 1000 rows, 1 key, ms": milliseconds(
            lambda: store.history(pk, min_step=middle, limit=1000, keys=["_step", KEYS[3]])
        ),
        "last row, ms": milliseconds(lambda: store.history_tail(pk, HISTORY)),
        "all attempts, ms": milliseconds(lambda: store.attempts(pk)),
    }
    singles = ingest(into(store, pk), 2_000, 1, first=rows)
    numbers["appends of 1 row, behind the long run, /s"] = singles["values_s"] / len(KEYS)
    other = new_run(store, f"short-{random.getrandbits(48):x}")
    singles = ingest(into(store, other), 10_000, 1)
    numbers["appends of 1 row, 10,000 in a new run, /s"] = singles["values_s"] / len(KEYS)
    attempt = 1
    base = Watermark(1, {HISTORY: {"rank0": middle}}, middle - 1)

    def begin() -> None:
        nonlocal attempt
        attempt += 1
        assert store.begin_attempt(pk, BeginAttempt(attempt, "nonce", "rank0", base), 3.0).accepted

    numbers["begin_attempt in the middle, ms"] = milliseconds(begin, repeat=5)
    numbers["chart of the cut run, ms"] = milliseconds(lambda: store.series(pk, KEYS[3], buckets=BUCKETS))
    again = ingest(into(store, pk, attempt), min(20_000, rows), size)
    numbers["values/s behind the cut"] = again["values_s"]
    store.close()
    return table, numbers


def bytes_of(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir() if not file.name.endswith(("-wal", "-shm")))


# Peers --------------------------------------------------------------------------------------------------


def open_plain(place: Path, table: str) -> Any:
    connection = sqlite_module.connect(place / "plain.db", isolation_level=None)
    for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", table):
        connection.execute(statement)
    return connection


def run_values(place: Path, rows: int, size: int) -> dict[str, float]:
    db = open_plain(
        place, "CREATE TABLE v (run INT, key TEXT, step INT, value REAL, PRIMARY KEY (run, key, step)) WITHOUT ROWID"
    )

    def append(_seq: int, lines: list[str]) -> None:
        parsed = [msgspec.json.decode(line) for line in lines]
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            "INSERT INTO v VALUES (1, ?, ?, ?)", [(key, row["_step"], value) for row in parsed for key, value in row.items()]
        )
        db.execute("COMMIT")

    table = ingest(append, rows, size)
    width = max(1, rows // BUCKETS)
    chart = (
        "SELECT min(step), max(step), count(*), min(value), max(value), avg(value) FROM v WHERE run=1 AND key=? GROUP BY step/?"
    )
    table["chart_ms"] = milliseconds(lambda: db.execute(chart, (KEYS[3], width)).fetchall(), repeat=3)
    db.close()
    return table | {"bytes_value": bytes_of(place) / (rows * len(KEYS))}


def run_texts(place: Path, rows: int, size: int) -> dict[str, float]:
    db = open_plain(place, "CREATE TABLE l (run INT, seq INT, line TEXT, PRIMARY KEY (run, seq)) WITHOUT ROWID")

    def append(seq: int, lines: list[str]) -> None:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO l VALUES (1, ?, ?)", list(enumerate(lines, seq)))
        db.execute("COMMIT")

    table = ingest(append, rows, size)

    def chart() -> list[float]:
        return [msgspec.json.decode(line)[KEYS[3]] for (line,) in db.execute("SELECT line FROM l WHERE run=1 ORDER BY seq")]

    table["chart_ms"] = milliseconds(chart, repeat=1)
    db.close()
    return table | {"bytes_value": bytes_of(place) / (rows * len(KEYS))}


def run_parse(_place: Path, rows: int, size: int) -> dict[str, float]:
    return ingest(lambda _seq, lines: [msgspec.json.decode(line) for line in lines], rows, size)


def run_http(place: Path, rows: int, size: int) -> dict[str, float]:
    """Through a real server; the CPU is the client's and says nothing."""
    from wbdist.protocol import file_stream, operations
    from wbdist.protocol.attempts import StreamStamp
    from wbdist.run.shipper.remote import Remote

    with Server(place) as server:
        remote = Remote(server.url, server.key)
        begin = BeginAttempt(1, "nonce", "rank0")
        operation = operations.upsert_run(project="store", run_id="r", entity=None)
        answer = remote.post("/graphql", operation.body())
        entity = operations.read_upserted(msgspec.json.decode(answer.body)["data"]).entity
        assert remote.post("/graphql", operations.begin_attempt(entity, "store", "r", begin).body()).ok
        target = file_stream.path(entity, "store", "r")

        def append(seq: int, lines: list[str]) -> None:
            stamp = StreamStamp(1, "nonce", "rank0", {HISTORY: seq})
            request = file_stream.StreamRequest(files={HISTORY: file_stream.FileChunk(lines, seq)}, wbdist=stamp)
            answer = remote.post(target, file_stream.encode_request(request))
            assert answer.ok, answer

        return ingest(append, rows, size)


# --------------------------------------------------------------------------------------------------------

SHOWN = ("values_s", "first", "last", "values_cpu_s", "p50_ms", "p99_ms", "max_ms", "chart_ms", "bytes_value")
PEERS: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
    "row per value": run_values,
    "line per row": run_texts,
    "parse": run_parse,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the long run")
    parser.add_argument("--peer-rows", type=int, default=100_000, help="of the peers' run; they are slower")
    parser.add_argument("--http", type=int, default=100_000, metavar="ROWS", help="rows sent to a server process; 0: none")
    parser.add_argument("--batch", type=int, default=100, help="rows of an append")
    parser.add_argument("--url", help="an empty PostgreSQL database for wbdist, instead of a SQLite file")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        long, numbers = run_wbdist(Path(name), args.rows, args.batch, args.url)
    table = [{"contender": "wbdist", "rows": args.rows, **long}]
    sizes = [(peer, call, args.peer_rows) for peer, call in PEERS.items()]
    sizes += [("http", run_http, args.http)] if args.http else []
    for peer, call, rows in sizes:
        with tempfile.TemporaryDirectory() as name:
            table.append({"contender": peer, "rows": rows, **call(Path(name), rows, args.batch)})
    if args.json:
        json.dump({"table": table, "numbers": numbers}, sys.stdout, indent=1)
        return
    print("| contender | rows | " + " | ".join(SHOWN) + " |")
    print("|" + "---|" * (len(SHOWN) + 2))
    for row in table:
        cells = [f"{row[key]:,.3g}" if key in row else "" for key in SHOWN]
        print(f"| {row['contender']} | {row['rows']:,} | " + " | ".join(cells) + " |")
    print()
    for what, number in numbers.items():
        print(f"{what}: {number:,.4g}", flush=True)


if __name__ == "__main__":
    main()
