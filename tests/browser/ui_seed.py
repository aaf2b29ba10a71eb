"""Runs for the pages to show, put through the real store as the server's endpoints do it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from typing import Any

from wbdist.core.goodput import OWN
from wbdist.core.position import ALERTS, CONSOLE, HISTORY, PHASES, Watermark
from wbdist.core.states import RunEvent
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store.interface import RunFields, Store


class SeededRun:
    """One run and its writer: every attempt begins where the given number of rows of the one before ends."""

    def __init__(self, store: Store, project: str, run_id: str, now: float, *, entity: str = "local", **fields: Any) -> None:
        config = {key: {"value": value} for key, value in fields.pop("config", {}).items()}
        wanted = RunFields(display_name=fields.pop("name", run_id), config=config, **fields)
        self.store, self.run_id, self.now = store, run_id, now
        self.pk = store.upsert_run(entity, project, run_id, wanted, now)[0].pk
        self.attempt = 0
        self.rows = 0
        self.lines = 0

    def begin(self, *, keep_rows: int = 0, keep_lines: int = 0, last_step: int = -1, cause: str = "start") -> None:
        """A new attempt, on the first `keep_rows` rows and `keep_lines` console lines of the current one."""
        base = None
        if self.attempt:
            counts = {HISTORY: {"rank0": keep_rows}, CONSOLE: {"rank0": keep_lines}}
            base = Watermark(self.attempt, counts, last_step)
        self.attempt += 1
        self.rows = self.lines = 0
        request = BeginAttempt(self.attempt, f"n{self.attempt}", "rank0", base, cause)
        assert self.store.begin_attempt(self.pk, request, self.now).accepted

    def log(self, rows: Iterable[dict[str, Any]], seconds: float = 0.0) -> None:
        """Appends rows (a bare NaN stays one) and takes the last for the summary."""
        lines = [json.dumps(row) for row in rows]
        self.now += seconds
        self._append(HISTORY, self.rows, lines)
        self.rows += len(lines)
        self.store.set_summary(self.pk, json.loads(lines[-1]), self.now, attempt=self.attempt)

    def print(self, *texts: str) -> None:
        self._append(CONSOLE, self.lines, list(texts))
        self.lines += len(texts)

    def alert(self, title: str, text: str, level: str, step: int) -> None:
        line = {"title": title, "text": text, "level": level, "_step": step, "_timestamp": self.now}
        self._append(ALERTS, 0, [json.dumps(line)])

    def mark(self, n: int, phase: str, step: int, at: float, *spent: float) -> None:
        """One of the timeline, `at` seconds ago; `spent` in the order of OWN, the rest nothing."""
        told = dict(zip(OWN, [*spent, *[0.0] * len(OWN)], strict=False))
        line = {"n": n, "phase": phase, "_step": step, **told, "_timestamp": self.now - at}
        self._append(PHASES, n, [json.dumps(line)])

    def _append(self, stream: str, seq: int, lines: list[str]) -> None:
        nonce = f"n{self.attempt}"
        done = self.store.append(self.pk, {stream: (seq, lines)}, self.now, attempt=self.attempt, nonce=nonce, writer="rank0")
        assert done.code == ""

    def end(self, *events: RunEvent, cause: str = "exit", exit_code: int | None = None) -> None:
        for event in events:
            self.store.record_event(self.pk, event, self.now, attempt=self.attempt, exit_code=exit_code, cause=cause)


def row(step: int, *, seed: int = 0, runtime: float | None = None, **more: float) -> dict[str, Any]:
    """A row of a training that converges, with noise that `seed` decides."""
    noise = random.Random(seed * 1_000_003 + step)
    loss = 2.3 * math.exp(-step / 150) + 0.08 + noise.gauss(0, 0.03)
    values = {"loss": loss, "accuracy": 1 - loss / 2.6, "lr": 0.05 * (1 + math.cos(step / 160)) / 2, **more}
    return {**values, "_step": step, "_timestamp": 0.0, "_runtime": step * 0.1 if runtime is None else runtime}


def seed_digits(store: Store, now: float, project: str = "digits") -> None:
    """A project as the demo leaves it, and a few runs with other fates."""
    preempted_then_killed(store, now - 900, project)
    for rank in range(4):
        member(store, now - 500, project, "sweep-7", rank)
    long_run(store, now - 86400, project)
    broken = SeededRun(store, project, "broken", now - 7200, name="too-high-lr", config={"lr": 5.0}, tags=["lr"])
    broken.begin()
    broken.log([row(i) for i in range(60)], 30)
    broken.log([{**row(i), "loss": math.nan if i < 75 else math.inf} for i in range(60, 90)], 15)
    broken.end(RunEvent.EXIT_NONZERO, exit_code=1)
    crashed = SeededRun(store, project, "crashed", now - 3600, name="lost-node", host="node-17")
    crashed.begin()
    crashed.log([row(i, seed=9) for i in range(120)], 40)
    crashed.end(RunEvent.LOST, cause="lost")
    SeededRun(store, project, "fresh", now - 5, name="just-started").begin()


def preempted_then_killed(store: Store, now: float, project: str, run_id: str = "digits-main") -> SeededRun:
    """440 steps in three attempts: preempted at 180 (checkpoint after 150), killed at 330 (after 300), finished."""
    config = {
        "lr": 0.05,
        "momentum": 0.9,
        "batch_size": 32,
        "epochs": 20,
        "world_size": 2,
        "model": {"name": "cnn", "layers": [16, 32]},
    }
    run = SeededRun(
        store,
        project,
        run_id,
        now,
        name="digits with two interruptions",
        config=config,
        tags=["demo", "ddp"],
        notes="Preempted with a real SIGTERM, then one rank killed with SIGKILL.",
        host="trainer-1",
        program="examples/digits_ddp.py",
        commit="4f9d2c81aa07be55f1c03a6e9d3347b2c0de9912",
        repo="https://example.org/digits.git",
        job_type="train",
    )
    run.begin()
    run.print("2026-11-21T06:00:01.120000 starting 2 ranks", "2026-11-21T06:00:02.310000 epoch 1 loss 2.27")
    run.mark(0, "train", 0, 0.0, 2.0)
    run.log([row(i) for i in range(180)], 18)
    run.mark(1, "save", 150, 4.0, 2.0, 0.0, 14.0)
    run.mark(2, "end", 180, 0.0, 2.0, 0.0, 17.0, 0.6, 0.4)
    run.print("ERROR 2026-11-21T06:00:20.000000 SIGTERM: saving, then exit 75")
    run.end(RunEvent.PREEMPT, RunEvent.EXIT_NONZERO, cause="preempted", exit_code=75)
    run.now += 4
    run.begin(keep_rows=150, keep_lines=3, last_step=149, cause="preempted")
    run.print("2026-11-21T06:00:25.000000 attempt 2 continues at step 150")
    run.mark(0, "train", 150, 0.0, 1.0, 0.5)
    run.log([row(i) for i in range(150, 330)], 19)
    run.mark(1, "save", 300, 4.0, 1.0, 0.5, 15.0)
    run.mark(2, "train", 300, 3.0, 1.0, 0.5, 15.0, 1.0)
    run.mark(3, "train", 330, 0.0, 1.0, 0.5, 18.0, 1.0)
    run.end(RunEvent.LOST, cause="lost")
    run.now += 3
    run.begin(keep_rows=150, keep_lines=1, last_step=299, cause="lost")
    run.alert("Restarted", "a process was lost", "WARN", 300)
    run.print(
        "2026-11-21T06:00:48.000000 attempt 3 continues at step 300", "2026-11-21T06:00:58.000000 \x1b[32maccuracy 0.981\x1b[0m"
    )
    run.mark(0, "train", 300, 0.0, 1.2, 0.4)
    run.log([row(i) for i in range(300, 440)], 15)
    run.mark(1, "end", 440, 0.0, 1.2, 0.4, 14.0, 0.8, 0.2)
    run.end(RunEvent.EXIT_ZERO, exit_code=0)
    return run


def member(store: Store, now: float, project: str, group: str, rank: int, rows: int = 200) -> SeededRun:
    """One rank of a running job with a run a rank."""
    run = SeededRun(
        store,
        project,
        f"{group}-r{rank}",
        now + rank * 0.01,
        name=f"{group}-rank{rank}",
        group=group,
        job_type="main" if rank == 0 else "worker",
        config={"rank": rank, "world_size": 4, "lr": 0.02},
    )
    run.begin()
    run.log([row(i, seed=rank + 1, samples_per_s=900 - 40 * rank + i % 7) for i in range(rows)], 480)
    return run


def long_run(store: Store, now: float, project: str, rows: int = 20_000) -> SeededRun:
    """More rows than a chart has pixels."""
    run = SeededRun(store, project, "long", now, name="long-run", config={"lr": 0.001})
    run.begin()
    noise = random.Random(5)
    values = [
        {
            "loss": 3 * math.exp(-i / 6000) + abs(noise.gauss(0, 0.15)),
            "grad_norm": noise.lognormvariate(0, 0.4),
            "_step": i,
            "_runtime": i / 2,
        }
        for i in range(rows)
    ]
    for start in range(0, rows, 5000):
        run.log(values[start : start + 5000], 2500)
    run.end(RunEvent.EXIT_ZERO, exit_code=0)
    return run


def often_begun(store: Store, now: float, project: str, begins: Iterable[int], rows: int) -> SeededRun:
    """A run of `rows` steps, of which an attempt after the first begins at each of `begins`."""
    run = SeededRun(store, project, "often", now, name="often")
    run.begin()
    first = 0
    for start in [*begins, rows]:
        run.log([row(i) for i in range(first, start + 1)], 1)
        if start < rows:
            run.begin(keep_rows=start - first, last_step=start - 1, cause="lost")
            first = start
    return run
