"""Whole jobs under the strategies besides rank0: they go on from their checkpoints as the same run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wbdist.run.journal import JournalReader, Kind, find_journals

SCRIPT = Path(__file__).with_name("tiny_job.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "writers"), [("shared", ["rank0", "rank1"]), ("rank_zero_only", ["rank0"])])
def test_job_goes_on_as_the_same_run(tmp_path: Path, strategy: str, writers: list[str]) -> None:
    """Proves that the second start continues the run of the first from its checkpoint, with every writer's rows below it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WBDIST_DATA_DIR": str(tmp_path / "data")}
    for epochs in ("2", "4"):
        command = [sys.executable, str(SCRIPT), "--checkpoint-dir", "ckpt", "--strategy", strategy, "--epochs", epochs]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=100, capture_output=True)
    found = {}
    for path in find_journals(tmp_path / "wandb"):
        with JournalReader.open(path) as reader:
            header = reader.header
            steps = {record.step for record in reader.read(1 << 24) if record.kind is Kind.ROW}
        base = header.base.counts["wandb-history.jsonl"] if header.base is not None else {}
        found[header.attempt, header.writer] = (header.run_id, steps, base)
    runs = {run_id for run_id, _, _ in found.values()}
    assert len(runs) == 1
    below = dict.fromkeys(writers, 20)
    assert {key: value[1:] for key, value in found.items()} == {
        (attempt, writer): ({*range(20 * attempt - 20, 20 * attempt)}, {} if attempt == 1 else below)
        for attempt in (1, 2)
        for writer in writers
    }
