"""64 writers attach to one run and detach, at random, with explicit steps, while one of their processes and the server die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.journals import read_all
from support.processes import kill, marked
from support.serving import Server
from support.waiting import until

import wbdist
from wbdist.run.journal import Kind, find_journals

WRITERS = Path(__file__).parent / "writers.py"
PLACES = 4
"""Processes, each on a disk of its own and so with a shipper of its own."""
Row = tuple[str, int, int]
"""Writer, step, value."""


def row_of(shown: dict[str, Any]) -> Row:
    ((writer, value),) = [(key, value) for key, value in shown.items() if not key.startswith("_")]
    return writer, shown["_step"], value


def journalled(place: Path) -> Counter[Row]:
    """What the disk has: of a killed process perhaps one row a writer more than was acknowledged."""
    rows: Counter[Row] = Counter()
    for path in find_journals(place / "wandb"):
        for record in read_all(path):
            if record.kind is Kind.ROW:
                rows.update((writer, int(record.step or 0), value) for writer, value in record.data.items())
    return rows


def acknowledged(place: Path) -> Counter[Row]:
    lines = [line.split() for line in (place / "acks").read_text().splitlines()]
    return Counter((writer, int(step), int(value)) for writer, step, value in lines)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_64_writers_of_one_run_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that each row of each writer is shown once, at its own step, in the order of steps; also those of a process that
    was killed in the middle, and over a server that was killed and came back."""
    server = Server(tmp_path / "server")
    server.start()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", server.key)
    mark = f"wbdist-writers-{os.getpid()}"
    monkeypatch.setenv("WBDIST_TRIAL", mark)
    places = [tmp_path / f"disk{number}" for number in range(PLACES)]
    processes = []
    try:
        for number, place in enumerate(places):
            place.mkdir()
            each = 64 // PLACES
            command = [sys.executable, str(WRITERS), str(number * each), str(each), "17"]
            processes.append(subprocess.Popen(command, cwd=place))
        until(lambda: (places[0] / "acks").exists() and sum(acknowledged(places[0]).values()) > 60, "rows of the first process")
        processes[0].kill()
        server.kill()
        server.start()
        assert [process.wait(90) for process in processes][1:] == [0] * (PLACES - 1)
        promised: Counter[Row] = sum(map(acknowledged, places), Counter())
        written: Counter[Row] = sum(map(journalled, places), Counter())
        assert promised <= written
        assert max(written.values()) == 1
        assert len({row[0] for row in written}) > 64, "writers came back"
        runs = wbdist.Api().runs("many")
        shown = until(lambda: _shown(runs[0], sum(written.values())), "every row on the server")
        assert Counter(map(row_of, shown)) == written
        steps = [row["_step"] for row in shown]
        assert steps == sorted(steps)
        (attempt,) = runs[0].attempts()
        assert (attempt.rows, attempt.rows_live) == (len(shown), len(shown))
    finally:
        for pid in marked(mark):
            kill(pid)
        for process in processes:
            process.wait(10)
        server.stop()


def _shown(run: Any, least: int) -> list[dict[str, Any]]:
    rows = list(run.scan_history())
    return rows if len(rows) >= least else []
