"""Rank identity: every source, its precedence, and contradictions."""

from __future__ import annotations

from typing import Any

import pytest

from wbdist.distributed import identity
from wbdist.distributed.identity import RankIdentity, detect
from wbdist.errors import UsageError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "abc",
}
LAUNCHER = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "WBDIST_INCARNATION": "x",
    "WBDIST_RESTART": "3",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_JOB_ID": "99",
}


def facts(found: RankIdentity) -> tuple[Any, ...]:
    return found.source, found.rank, found.world_size, found.local_rank, found.local_world_size, found.node_rank


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("alone", 0, 1, 0, 1, 0)),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4, 1)),
        (LAUNCHER, ("launcher", 1, 2, 1, 2, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, ("environment", 3, 4, 3, 4, 0)),
        (SRUN, ("slurm", 5, 7, 1, 3, 2)),
        (SRUN | TORCHRUN, ("torchrun", 5, 8, 1, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "99"}, ("alone", 0, 1, 0, 1, 0)),
    ],
    ids=["nothing", "torchrun", "launcher", "by hand", "srun", "torchrun in srun", "batch script"],
)
def test_sources(env: dict[str, str], expected: tuple[Any, ...]) -> None:
    """Proves which source decides, and that all five numbers come from it."""
    found = detect(env)
    assert facts(found) == expected
    assert found.reason


def test_job_key_and_restart() -> None:
    """Proves that the job's name over requeues is found where somebody gives one."""
    assert (detect(TORCHRUN).job_key, detect(TORCHRUN).restart) == ("torchrun-abc", 2)
    assert detect(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}).job_key == ""
    assert detect(SRUN).job_key == "slurm-99"
    assert detect(SRUN | {"SLURM_ARRAY_JOB_ID": "90", "SLURM_ARRAY_TASK_ID": "4"}).job_key == "slurm-90-4"
    assert detect(LAUNCHER).restart == 3
    assert detect({"WBDIST_JOB_KEY": "mine"}).job_key == "mine"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 does not fit world size 4"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK='x' is not a whole number"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 does not fit local world size 4"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "local world size 4 is larger than world size 2"),
        (SRUN | {"SLURM_PROCID": "7"}, "rank 7 does not fit world size 7"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two'"),
    ],
)
def test_contradictions_are_refused(env: dict[str, str], said: str) -> None:
    """Proves that an impossible environment is refused, naming what contradicts what."""
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        detect(env)


def test_an_initialised_group_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a process group decides where the environment is silent, and that a contradiction names both.

    (That it is found at all is proven with a real group in test_coordination.)
    """
    monkeypatch.setattr(identity, "_process_group", lambda: (1, 2))
    assert facts(detect({})) == ("process_group", 1, 2, 1, 2, 0)
    assert detect(LAUNCHER).source == "launcher"
    with pytest.raises(
        UsageError, match=r"initialised as rank 1 of 2, but the environment says rank 5 of 8 \(RANK=5, WORLD_SIZE=8\)"
    ):
        detect(TORCHRUN)
