"""`wbdist sync`: offline runs and leftovers, once, any number of times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def sync(*arguments: object, key: str = "k" * 40) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wbdist", "sync", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": key}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)


def test_offline_runs_are_synced_any_number_of_times(loopback: Any, wandb: Any) -> None:
    """Proves that offline journals of several attempts arrive in order and whole, that repeating changes nothing, and that
    feeds are left out."""
    first = wandb.journal(run_id="r1", attempt=1)
    wandb.rows(first, 0, 1200)
    first.close(1)
    second = wandb.journal(run_id="r1", attempt=2)
    wandb.rows(second, 1200, 1300)
    second.close(0)
    wandb.journal(run_id="r1", attempt=3, writer="rank1", role="feed").close(0)
    done = sync(wandb.root, "--base-url", loopback.url, "--json")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["attempt"], r["outcome"]) for r in results] == [(1, "complete"), (2, "complete"), (3, "skipped")]
    lines = {key: list(value) for key, value in loopback.lines.items()}
    assert [row["_step"] for row in loopback.history(1) + loopback.history(2)] == list(range(1300))
    marks = ["begin 1", "complete 1", "ended exit", "begin 2", "complete 0", "ended exit"]
    assert loopback.marks == marks
    done = sync(wandb.root, "--base-url", loopback.url)
    assert done.returncode == 0, done.stderr
    assert "fenced" in done.stdout, "attempt 1 is superseded by now"
    assert loopback.lines == lines
    assert loopback.marks == [*marks, "complete 0", "ended exit"]


def test_a_living_run_is_brought_up_to_date(loopback: Any, wandb: Any) -> None:
    """Proves that sync of a run that is still being written sends what is there and does not call it ended."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 50)
    done = sync(writer.path.parent)
    assert done.returncode == 0, done.stderr
    assert "current" in done.stdout
    assert len(loopback.history()) == 50
    assert loopback.marks == ["begin 1"]


def test_bad_input_and_absent_servers_are_told(loopback: Any, wandb: Any, tmp_path: Path) -> None:
    """Proves that a path without journals, damaged journals and absent servers give clear messages and codes."""
    done = sync(tmp_path / "nothing")
    assert done.returncode == 65
    assert "no journal at" in done.stderr
    (wandb.root / "run-x").mkdir()
    (wandb.root / "run-x" / "bad.a1.wbdj").write_bytes(b"garbage")
    done = sync(wandb.root / "run-x", "--base-url", loopback.url)
    assert done.returncode == 70
    assert "is not a wbdist journal" in done.stdout
    writer = wandb.journal(loopback.url)
    loopback.stop()
    done = sync(writer.path, "--timeout", "0.5")
    assert done.returncode == 70
    assert "does not answer" in done.stdout
    done = sync(writer.path, "--base-url", "ftp://x")
    assert done.returncode == 65
    assert "not a server's address" in done.stderr
