"""DDP watched: the gradients' bits, what is told, and what is refused. Real ranks under torchrun, over gloo."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.feeding import REPOSITORY
from support.journals import rows_of
from support.torchrun import torchrun

from wbdist.run.journal import JournalHeader, JournalReader, find_journals

PROGRAMS = Path(__file__).with_name("programs")


def check_bits(ranks: int, seed: int, cases: int, tmp_path: Path) -> None:
    torchrun(ranks, PROGRAMS / "ddp_bits.py", tmp_path, seed, cases, cwd=tmp_path, timeout=600)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["cases"]) == cases
    for trial in report["cases"]:
        case, rows = trial["case"], trial["rows"]
        assert trial["same"], f"gradients differ: {case}"
        assert len(rows) == 4, f"a row for each pass that reduced: {case}"
        for number, (row, norm) in enumerate(zip(rows, trial["norms"], strict=True)):
            looked = case["detail_every"] and number % case["detail_every"] == 0
            assert row["ddp/exposed_ms"] > 0
            assert ("ddp/grad_norm" in row) == ("ddp/buckets" in row) == bool(looked), case
            if looked:
                # PowerSGD's own gradients are NaN now and then, on one rank.
                assert row["ddp/grad_norm"] == pytest.approx(norm, rel=1e-5, nan_ok=True), case
                assert (row["ddp/nonfinite"] > 0) == math.isnan(norm), case
                assert row["ddp/buckets"] >= 1
                assert row["ddp/bytes"] > 0
                assert row["ddp/comm_ms"] > 0
                assert 0.0 <= row["ddp/overlap"] <= 1.0
                assert row["ddp/wait_ms"] > 0
    for trial in report["uneven"]:
        assert trial["same"], f"under Join gradients or rows differ: {trial}"


def test_gradients_are_the_same_bits(tmp_path: Path) -> None:
    """Proves that watching changes no bit of any gradient, with the user's own hook, another's, or none: static graphs,
    accumulation, unused parameters, views, sparse gradients, uneven inputs; and that the norms told are the gradients'.

    Three ranks: for a power of two DDP's two ways of averaging give the same bits.
    """
    check_bits(3, seed=1, cases=6, tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize(("ranks", "seed"), [(1, 2), (2, 3), (3, 4), (4, 5), (8, 6)])
def test_gradients_are_the_same_bits_in_any_world(ranks: int, seed: int, tmp_path: Path) -> None:
    """Proves the same for many more cases and from 1 to 8 ranks."""
    check_bits(ranks, seed=seed, cases=60 if ranks < 8 else 25, tmp_path=tmp_path)


def header_of(path: Path) -> JournalHeader:
    with JournalReader.open(path) as reader:
        return reader.header


def runs_of(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Run id -> history rows, of the journals below `root`."""
    found = {}
    for path in find_journals(root / "wandb"):
        header = header_of(path)
        if header.role == "run":
            found[header.run_id] = rows_of(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["rank0", "per_rank"])
def test_a_job_tells_of_its_reduction(strategy: str, tmp_path: Path) -> None:
    """Proves that one line brings the numbers into the row of each step, under both strategies; that a NaN is told with the
    parameter's name, once; that `watch` works on each rank beside it; and that a hook that is there already is refused."""
    said = torchrun(2, PROGRAMS / "ddp_job.py", strategy, cwd=tmp_path)
    assert said.count("has the communication hook allreduce_hook already") == 2
    assert said.count("step 5: the gradient is not finite: 5 elements, in weight, bias") == 1
    runs = runs_of(tmp_path)
    assert len(runs) == (1 if strategy == "rank0" else 2)
    for rows in runs.values():
        told = [row for row in rows if "ddp/bytes" in row]
        assert len(told) == 8
        for row in told:
            assert row["ddp/bytes"] == 5 * 4
            assert row["ddp/buckets"] == 1
            assert "parameters/weight" in row
            broken = row["_step"] == 5
            assert row["ddp/nonfinite"] == (5 if broken else 0)
            if not broken:
                assert row["ddp/grad_norm"] == pytest.approx(row["norm"], rel=1e-5)


@pytest.mark.slow
def test_the_step_that_fails_keeps_its_numbers(tmp_path: Path) -> None:
    """Proves that what was found in a step that an error ends is in its row: it may say why."""
    said = torchrun(2, PROGRAMS / "ddp_job.py", "per_rank", 3, cwd=tmp_path, exit_code=1)
    assert "ValueError: as asked" in said
    for rows in runs_of(tmp_path).values():
        assert [row["_step"] for row in rows] == [0, 1, 2, 3]
        assert all(row["ddp/grad_norm"] == pytest.approx(row["norm"], rel=1e-5) for row in rows)


@pytest.mark.slow
def test_with_one_rank_there_is_nothing_to_watch(tmp_path: Path) -> None:
    """Proves that the script needs no case distinction for a single process."""
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "ddp_job.py"), "auto"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (rows,) = runs_of(tmp_path).values()
    assert len(rows) == 8
    assert not any(key.startswith("ddp/") for row in rows for key in row)


@pytest.mark.slow
def test_uneven_data_within_a_step(tmp_path: Path) -> None:
    """Proves that torch's Join works inside a job's steps: ranks with fewer batches hang nobody, saves and an agreed stop
    happen in between, and the job goes on to the history and the weights of one that was not stopped."""
    for directory in ("stopped", "straight"):
        (tmp_path / directory).mkdir()
    assert "weights" not in torchrun(3, PROGRAMS / "ddp_uneven.py", tmp_path / "stopped", cwd=tmp_path / "stopped")
    resumed = torchrun(3, PROGRAMS / "ddp_uneven.py", tmp_path / "stopped", cwd=tmp_path / "stopped")
    straight = torchrun(3, PROGRAMS / "ddp_uneven.py", tmp_path / "straight", "straight", cwd=tmp_path / "straight")
    assert resumed[resumed.index("weights") :].splitlines()[0] == straight[straight.index("weights") :].splitlines()[0]
    found = []
    for root in ("stopped", "straight"):
        journals = [path for path in find_journals(tmp_path / root / "wandb") if header_of(path).role == "run"]
        # A later attempt's rows are the true ones.
        journals.sort(key=lambda path: header_of(path).attempt)
        rows = {row["_step"]: row.get("batches") for path in journals for row in rows_of(path)}
        found.append([rows[step] for step in range(10)])
    assert found[0] == found[1] == [6.0] * 10


@pytest.mark.slow
def test_all_steps_under_one_join(tmp_path: Path) -> None:
    """Proves that Join around a job's steps does no harm: saves, an agreed stop and the next attempt are as without it."""
    assert "weights" not in torchrun(2, PROGRAMS / "ddp_uneven.py", tmp_path, "around", cwd=tmp_path)
    assert "weights" in torchrun(2, PROGRAMS / "ddp_uneven.py", tmp_path, "around", cwd=tmp_path)
    journals = sorted(find_journals(tmp_path / "wandb"), key=lambda path: header_of(path).attempt)
    rows = {row["_step"]: row.get("batches") for path in journals if header_of(path).role == "run" for row in rows_of(path)}
    assert rows == dict.fromkeys(range(10), 4.0)


@pytest.mark.slow
def test_a_rank_with_other_data_is_refused(tmp_path: Path) -> None:
    """Proves that a rank whose loader makes other steps than rank 0's says so at once; the others would wait for it."""
    with pytest.raises(AssertionError) as ended:
        torchrun(2, PROGRAMS / "ddp_uneven.py", tmp_path, "other", cwd=tmp_path)
    said = str(ended.value)
    assert "refused on rank 1: job.steps() loops over other data on rank 1 than on rank 0" in said
    assert "rank 0: 80 samples, batch_size=4" in said
    assert "rank 1: 76 samples, batch_size=4" in said


def test_a_step_sums_in_the_same_order_first_or_not(tmp_path: Path) -> None:
    """Proves that three ranks whose DDP was made anew before any step, as after a kill, reach the very weights of those that
    went straight on: partly frozen with two types, unused parameters, static graphs, sparse gradients, gradients that are
    views of buckets, accumulating, watched, and wrapped by the script itself."""
    torchrun(3, PROGRAMS / "ddp_settled.py", tmp_path / "report.json", cwd=tmp_path)
    differing = json.loads((tmp_path / "report.json").read_text())
    assert len(differing) == 14
    assert not any(differing.values()), differing
