"""A server process over the W&B wire: ingest as a run grows, rewind and fork of a long run, many forks, one chart.

    python benchmarks/server_lifecycle.py [--rows 1000000] [--batch 100] [--forks 50] [--json]

One client that waits for each answer, as the wandb SDK does; rows of 10 float metrics beside `_step`, `_timestamp` and
`_runtime`, made beforehand and not timed; a *value* is one metric of one row.

- `plain`: posts of W&B's client, into a new run. `first` and `last` are the first and the last tenth of it.
- `resumed`: the same into a run that was resumed, so that offsets are those of a longer history.
- `rewind`, `fork`: `RewindRun`, and `UpsertBucket` with a branch point, of the long run; milliseconds an answer.
- `forks`: of a run a tenth as long, each with 1000 rows of its own; bytes of the database a fork, beside those of the same 1000
  rows in a run that is no fork; and reading the steps of one.
- `chart`: `SqlStore.series` of one metric of the long run, 1000 buckets, warm.

`cpu` is what the process that did the work took, a time: on a shared machine trust it before the wall clock.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common.serving import Server

from wbdist.server.store import open_store

KEYS = [f"train/metric_{number}" for number in range(10)]
BUCKETS = 1000
OWN_ROWS = 1000
UPSERT = """mutation UpsertBucket($name: String, $host: String, $config: JSONString, $id: String) {
  upsertBucket(input: {name: $name, modelName: "bench", host: $host, config: $config, id: $id}) {
    bucket { id historyLineCount } } }"""
REWIND = """mutation RewindRun($name: String!, $step: Float!) {
  rewindRun(input: {runName: $name, projectName: "bench", metricName: "_step", metricValue: $step}) {
    rewoundRun { historyLineCount } } }"""


class Client:
    """One kept connection, one request at a time."""

    def __init__(self, url: str, key: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"))
        token = base64.b64encode(f"api:{key}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}

    def post(self, path: str, body: bytes) -> Any:
        self._connection.request("POST", path, body, self._headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {text[:300]!r}")
        return json.loads(text)

    def ask(self, query: str, **variables: Any) -> Any:
        return self.post("/graphql", json.dumps({"query": query, "variables": variables}).encode())["data"]

    def open(self, name: str, *, branch: dict[str, Any] | None = None, storage_id: str | None = None) -> Any:
        """As a process of W&B's client that starts, forks or resumes."""
        internal = {"t": {"5": "0.31.0"}} | ({"branch_point": branch} if branch else {})
        config = json.dumps({"_wandb": {"value": internal}})
        return self.ask(UPSERT, name=name, host="h", config=config, id=storage_id)["upsertBucket"]["bucket"]


def body(first: int, count: int, offset: int) -> bytes:
    noise = np.random.default_rng(first).random((count, len(KEYS)), dtype=np.float32).astype(np.float64)
    lines = [
        json.dumps({**dict(zip(KEYS, row, strict=True)), "_step": step, "_timestamp": 1.7e9 + step, "_runtime": step * 0.013})
        for step, row in enumerate(noise.tolist(), first)
    ]
    return json.dumps({"files": {"wandb-history.jsonl": {"offset": offset, "content": lines}}}).encode()


def ingest(client: Client, run: str, first: int, rows: int, batch: int) -> dict[str, float]:
    """Values a second: of all rows, of the first and of the last tenth."""
    times: list[float] = []
    for block in range(first, first + rows, batch * 100):
        ready = [body(at, batch, at) for at in range(block, min(block + batch * 100, first + rows), batch)]
        for request in ready:
            begun = time.perf_counter()
            client.post(f"/files/local/bench/{run}/file_stream", request)
            times.append(time.perf_counter() - begun)
    tenth = max(1, len(times) // 10)
    values = batch * len(KEYS)
    return {
        "all": values * len(times) / sum(times),
        "first": values * tenth / sum(times[:tenth]),
        "last": values * tenth / sum(times[-tenth:]),
        "p50_ms": statistics.median(times) * 1e3,
    }


def milliseconds(work: Callable[[int], object], times: int, process: psutil.Process) -> dict[str, float]:
    """Of the wall clock, and of the CPU that `process` took."""
    taken = []
    before = process.cpu_times()
    for number in range(times):
        begun = time.perf_counter()
        work(number)
        taken.append((time.perf_counter() - begun) * 1e3)
    after = process.cpu_times()
    cpu = (after.user + after.system - before.user - before.system) / times * 1e3
    return {"median": statistics.median(taken), "worst": max(taken), "cpu": cpu}


def checkpointed(data: Path) -> int:
    """Bytes in use, without what a log holds twice."""
    with sqlite3.connect(data / "wbdist.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(FULL)")
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return int((pages - free) * size)


def measure(client: Client, data: Path, server: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    rows, batch, forks = options.rows, options.batch, options.forks
    own = psutil.Process()
    out: dict[str, Any] = {}
    opened = client.open("long")
    out["plain"] = ingest(client, "long", 0, rows, batch)
    resumed = client.open("long", storage_id=opened["id"])
    assert resumed["historyLineCount"] == rows
    out["resumed"] = ingest(client, "long", rows, rows // 10, batch)

    short = max(2 * OWN_ROWS, rows // 10)
    client.open("short")
    ingest(client, "short", 0, short, batch)
    cut = short // 2
    before = checkpointed(data)
    client.open("alone")
    ingest(client, "alone", 0, OWN_ROWS, batch)
    alone = checkpointed(data) - before
    before = checkpointed(data)
    for number in range(forks):
        client.open(f"fork{number}", branch={"run_id": "short", "step": cut})
        ingest(client, f"fork{number}", cut + 1, OWN_ROWS, batch)
    out["forks"] = {"bytes_each": (checkpointed(data) - before) / forks, "bytes_alone": alone, "source_bytes_of": short}

    store = open_store(f"sqlite:///{data / 'wbdist.db'}")
    try:
        found = store.get_run("local", "bench", "long")
        last = store.get_run("local", "bench", f"fork{forks - 1}")
        assert found is not None
        assert last is not None
        store.series(found.pk, KEYS[3], buckets=BUCKETS)
        out["chart_ms"] = milliseconds(lambda _: store.series(found.pk, KEYS[3], buckets=BUCKETS), 20, own)
        out["fork_chart_ms"] = milliseconds(lambda _: store.series(last.pk, KEYS[3], buckets=BUCKETS), 20, own)
    finally:
        store.close()

    def fork(number: int) -> None:
        client.open(f"of_long{number}", branch={"run_id": "long", "step": rows // 2 + 37 * number})

    def rewind(number: int) -> None:
        client.ask(REWIND, name="long", step=float(rows - 1000 * (number + 1)))

    out["fork_ms"] = milliseconds(fork, 15, server)
    out["rewind_ms"] = milliseconds(rewind, 15, server)
    out["short_fork_ms"] = milliseconds(
        lambda n: client.open(f"of_short{n}", branch={"run_id": "short", "step": 500 + n}), 15, server
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--forks", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, Server(Path(place)) as server:
        found = measure(Client(server.url, server.key), server.data, psutil.Process(server.process.pid), options)
    if options.json:
        print(json.dumps(found))
        return
    for name, values in found.items():
        print(f"{name:14}", "  ".join(f"{key} {value:,.2f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
