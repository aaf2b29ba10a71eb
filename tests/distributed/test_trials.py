"""The parameters of a sweep's trial, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.feeding import PROGRAMS, REPOSITORY
from support.ranks import ThreadCoordinator, run_ranks

import wbdist
from wbdist.distributed.trials import as_shared_trial
from wbdist.errors import PeerLostError
from wbdist.run.init import make_spec
from wbdist.run.journal import JournalReader, Kind, find_journals
from wbdist.run.lifecycle import RunSpec
from wbdist.settings import resolve


def test_every_rank_of_every_strategy_has_them(tmp_path: Path) -> None:
    """Proves with real processes, of which only rank 0 was told of the sweep, as by an agent on its host, that every rank's
    config has the trial's parameters and cannot change them; that the trial's id is the run's, with per_rank rank 0's; that one
    run of a trial is the sweep's; and that one rank says what is ignored."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "config-t.yaml").write_text("wandb_version: 1\n\nlr:\n  value: 0.5\nnet:\n  value:\n    width: 16\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC_", "SLURM_"))}
    started = []
    for rank in range(2):
        env = {**clean, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{PROGRAMS}"}
        if rank == 0:
            env |= {"WANDB_SWEEP_ID": "sw1", "WANDB_SWEEP_PARAM_PATH": "config-t.yaml"}
        command = [sys.executable, str(PROGRAMS / "trial.py"), str(tmp_path / "keys")]
        started.append(
            subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    parameters = {"lr": 0.5, "net": {"width": 16, "deep": 2}, "rank": 16}
    for rank, (out, _) in enumerate(said):
        found = {line["strategy"]: line for line in map(json.loads, out.splitlines())}
        assert len(found) == 4
        for strategy, line in found.items():
            assert parameters.items() <= line["config"].items(), (rank, line)
            of_its_own = strategy == "per_rank" and rank > 0
            assert line["id"] == (f"t-{strategy}-r{rank}" if of_its_own else f"t-{strategy}")
            assert line["sweep"] == (None if of_its_own else "sw1")
    assert (said[0][1].count("9 is ignored"), said[1][1].count("ignored")) == (4, 0), said
    runs: dict[str, Any] = {}
    for path in find_journals(tmp_path / "wandb"):
        with JournalReader.open(path) as reader:
            if reader.header.role == "run":
                facts = next(record.data for record in reader.read() if record.kind is Kind.RUN)
                runs.setdefault(reader.header.run_id, []).append(facts.get("sweep"))
    assert runs == {
        "t-rank0": ["sw1"],
        "t-per_rank": ["sw1"],
        "t-per_rank-r1": [None],
        "t-shared": ["sw1", "sw1"],
        "t-rank_zero_only": ["sw1"],
    }


def spec_of(path: Path | str | None, sweep: str | None = "sw1") -> RunSpec:
    told = {"sweep_id": sweep, "sweep_param_path": None if path is None else str(path)}
    return make_spec(resolve({"project": "p", **told}), config={"lr": 1.0, "seed": 1})


def shared(*specs: RunSpec, timeout: float = 20) -> list[Any]:
    """What each rank has, or raised."""
    return run_ranks(len(specs), lambda peers: as_shared_trial(peers, "trial", specs[peers.rank], timeout))


def test_the_file_may_be_on_another_ranks_host(tmp_path: Path) -> None:
    """Proves that when rank 0 came to a host without the agent's file, by a restart, the lowest rank that has it tells all; and
    that a rank which was told less than rank 0 takes its word."""
    for rank in (1, 2):
        (tmp_path / f"{rank}.yaml").write_text(f"lr: {{value: 0.{rank}}}")
    told = [({"lr": 0.1, "seed": 1}, {"lr": 0.1}, "sw1")] * 3
    here = [spec_of(tmp_path / f"{rank}.yaml") for rank in range(3)]
    assert [(spec.config, spec.locked, spec.sweep) for spec in shared(*here)] == told
    here = [spec_of(None), spec_of(tmp_path / "1.yaml", None), spec_of(None, None)]
    assert [(spec.config, spec.locked, spec.sweep) for spec in shared(*here)] == told


def test_without_the_file_no_rank_trains(tmp_path: Path) -> None:
    """Proves that all ranks raise the same error, which names the file, when none of them has it or it holds what no config
    can, and that a job which is no trial's is left as it is."""
    (tmp_path / "odd.yaml").write_text("lr: {value: {1: 2}}")
    for name in ("gone.yaml", "odd.yaml"):
        errors = shared(*[spec_of(tmp_path / name)] * 3)
        assert all(isinstance(error, wbdist.UsageError) for error in errors), errors
        assert len({str(error) for error in errors}) == 1
        assert "on no rank" in str(errors[0])
    assert "gone.yaml" in str(shared(spec_of(tmp_path / "gone.yaml"))[0])
    assert shared(*[plain := spec_of(None, None)] * 2) == [plain] * 2


def test_a_trial_that_rank_0_does_not_know_is_refused(tmp_path: Path) -> None:
    """Proves that ranks whose launcher gave rank 0 no environment of the agent's do not train with other parameters unsaid."""
    (tmp_path / "1.yaml").write_text("lr: {value: 0.5}")
    errors = shared(spec_of(None, None), spec_of(tmp_path / "1.yaml"))
    assert all(isinstance(error, wbdist.UsageError) and "rank 1 was started" in str(error) for error in errors), errors


def test_a_rank_that_does_not_come_is_named() -> None:
    """Proves that the ranks do not wait for ever for one that is lost."""

    def rank(peers: ThreadCoordinator) -> RunSpec | None:
        return None if peers.rank == 2 else as_shared_trial(peers, "trial", spec_of(None), 0.2)

    lost = run_ranks(3, rank)[:2]
    assert all(isinstance(error, PeerLostError) and "2" in str(error) for error in lost), lost
