"""An aggregator whose rank 0 is gone: it leaves, soon and without a word that would pass for the run's end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
from support.feeding import REPOSITORY
from support.journals import records_of

from wbdist.distributed.aggregator import LINGER, Plan
from wbdist.run.init import make_spec
from wbdist.run.journal import Kind, find_journals
from wbdist.settings import resolve

NOBODY = 1
"""Not the pid of the process that starts the aggregator: so its rank 0 counts as dead."""


def start(root: Path) -> subprocess.Popen[bytes]:
    settings = resolve({"mode": "offline", "root_dir": str(root), "project": "p", "run_id": "job", "console": "off"})
    plan = Plan(spec=make_spec(settings), world_size=3, parent=NOBODY, key=b"k" * 32, host="127.0.0.1")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "wbdist.distributed.aggregator"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    process.stdin.write(msgspec.msgpack.encode(plan))
    return process


def ends(root: Path) -> list[object]:
    (journal,) = find_journals(root / "wandb")
    return list(records_of(journal, Kind.END))


def test_ranks_that_never_came_are_not_waited_for_once_rank0_is_lost(tmp_path: Path) -> None:
    """Proves that an aggregator started while its launcher takes the job down does not stay for ranks that are gone already."""
    process = start(tmp_path)
    process.communicate(timeout=LINGER)
    assert process.returncode == 70
    assert ends(tmp_path) == []


def test_without_anybody_to_answer_the_run_is_lost_and_not_failed(tmp_path: Path) -> None:
    """Proves that one whose rank 0 died while it came up leaves in silence, and tells no end: the attempt may have others."""
    process = start(tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    process.stdin.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(LINGER) == 70
    assert b"Traceback" not in said, said.decode()
    assert ends(tmp_path) == []
