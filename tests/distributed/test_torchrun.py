"""A whole DDP job under the real torchrun: its ranks are known, and every one's rows are in the run or runs, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.feeding import PROGRAMS
from support.journals import records_of, rows_of
from support.torchrun import torchrun

from wbdist.run.journal import JournalReader, Kind, find_journals

STEPS = 10


def play(size: int, root: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Strategy -> run id -> rows, of a job of `size` gloo ranks under each; checks what the ranks themselves saw."""
    said = torchrun(size, PROGRAMS / "torchrun_job.py", STEPS, "rank0", "per_rank", cwd=root)
    seen = [json.loads(line) for line in said.splitlines() if line.startswith('{"strategy"')]
    assert sorted((facts["strategy"], facts["rank"]) for facts in seen) == sorted(
        (strategy, rank) for strategy in ("rank0", "per_rank") for rank in range(size)
    )
    assert {(facts["size"], facts["backend"]) for facts in seen} == {(size, "gloo" if size > 1 else None)}
    for strategy in ("rank0", "per_rank"):
        assert len({str(facts["weights"]) for facts in seen if facts["strategy"] == strategy}) <= 1, "DDP's ranks are alike"
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"rank0": {}, "per_rank": {}}
    for path in find_journals(root / "wandb"):
        with JournalReader.open(path) as reader:
            header = reader.header
        if header.role == "run":
            assert records_of(path, Kind.END)[-1]["exit_code"] == 0
            name = records_of(path, Kind.RUN)[0]["display_name"]
            assert header.run_id not in found[name.partition("-rank")[0]], "a run has one writer"
            found[name.partition("-rank")[0]][header.run_id] = rows_of(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_of_torchrun_is_there_once(size: int, tmp_path: Path) -> None:
    """Proves for 1, 2, 4 and 8 gloo ranks under torchrun: in one run for all, each step is one row to which each rank added
    once; in a run for each, there are as many in one group, each with each step once, its own rank's."""
    found = play(size, tmp_path)
    everyone = 2**size - 1
    (rows,) = found["rank0"].values()
    who = {"who": 0} if size == 1 else {f"who/rank{rank}": rank for rank in range(size)}
    shown = {"_step", "all", "logged", *who}
    told = [{key: value for key, value in row.items() if key in shown or key.startswith("who")} for row in rows]
    assert told == [{"_step": step, "all": everyone, "logged": size, **who} for step in range(STEPS)]
    runs = found["per_rank"]
    (group,) = {run_id.rpartition("-r")[0] for run_id in runs}
    assert sorted(runs) == sorted(f"{group}-r{rank}" for rank in range(size))
    for run_id, rows in runs.items():
        rank = int(run_id.rpartition("-r")[2])
        assert [(row["_step"], row["who"], row["all"], row["logged"]) for row in rows] == [
            (step, rank, everyone, 1) for step in range(STEPS)
        ]
