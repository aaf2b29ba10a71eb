"""Rank identity: every source, its precedence, and contradictions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from wbdist.distributed import identity
from wbdist.distributed.coordination import store_address
from wbdist.distributed.identity import POOL_WORKER, RankIdentity, detect, table
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
OPENMPI = {  # as mpirun of Open MPI 4.1 sets them; it numbers processes of the host, not hosts, as NODE_RANK
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "PMIX_RANK": "5",
    "PMIX_NAMESPACE": "1649541121",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_FD": "6"}  # MPICH 4.0
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4", "HOSTNAME": "train-2"}


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
        (OPENMPI, ("openmpi", 5, 6, 1, 2, 2)),
        (OPENMPI | SRUN, ("openmpi", 5, 6, 1, 2, 2)),
        (OPENMPI | TORCHRUN, ("torchrun", 5, 8, 1, 4, 1)),
        (HYDRA, ("mpi", 2, 4, 0, 2, 1)),
        ({"PMI_RANK": "5", "PMI_SIZE": "7"} | SRUN, ("slurm", 5, 7, 1, 3, 2)),
        (HYDRA | SRUN, ("mpi", 2, 4, 0, 2, 1)),
        ({"PMI_RANK": "1"} | TORCHRUN, ("torchrun", 5, 8, 1, 4, 1)),
        (KUBERNETES, ("kubernetes", 2, 4, 0, 1, 2)),
        (KUBERNETES | TORCHRUN, ("torchrun", 5, 8, 1, 4, 1)),
        ({"JOB_COMPLETION_INDEX": "2"}, ("alone", 0, 1, 0, 1, 0)),
        (LAUNCHER | {POOL_WORKER: f"3:{os.getpid()}"}, ("pool", 0, 1, 0, 1, 0)),
        (LAUNCHER | {POOL_WORKER: f"3:{os.getpid() + 1}"}, ("launcher", 1, 2, 1, 2, 0)),
    ],
    ids=[
        "nothing",
        "torchrun",
        "launcher",
        "by hand",
        "srun",
        "torchrun in srun",
        "batch script",
        "Open MPI",
        "Open MPI's daemons in srun",
        "torchrun in mpirun",
        "MPICH",
        "srun with PMI",
        "Hydra's proxies in srun",
        "torchrun beside half of PMI",
        "indexed job",
        "torchrun in an indexed job",
        "indexed job of single tasks",
        "a rank's pool",
        "a rank started by a pool's worker",
    ],
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
    assert detect(KUBERNETES).job_key == "kubernetes-train"
    assert detect({"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "train-2"}).job_key == "kubernetes-train-2"


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
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1 is set but OMPI_COMM_WORLD_SIZE is not"),
        (HYDRA | {"RANK": "0", "WORLD_SIZE": "4"}, "RANK=0, WORLD_SIZE=4 .* but PMI_RANK=2, PMI_SIZE=4"),
        (KUBERNETES | {"RANK": "0"}, "RANK=0, WORLD_SIZE=4 .* but JOB_COMPLETION_INDEX=2"),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "local rank 2 does not fit local world size 2"),
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
    monkeypatch.setattr(identity, "_process_group", lambda: (5, 6))
    assert facts(detect(OPENMPI)) == ("process_group", 5, 6, 1, 2, 2), "what agrees knows the place on the host"


def test_table_tells_what_each_source_said() -> None:
    """Proves that a person can see who decided, and what the others said."""
    rows = {row.source: row for row in table(OPENMPI | TORCHRUN)}
    assert [row.source for row in rows.values() if row.decides] == ["torchrun"]
    assert rows["openmpi"].says == "rank 5 of 6: OMPI_COMM_WORLD_RANK=5, OMPI_COMM_WORLD_SIZE=6"
    assert not rows["slurm"].says
    assert [row.source for row in table({}) if row.decides] == ["alone"]


def test_ranks_of_open_mpi_on_one_host_find_each_other() -> None:
    """Proves that mpirun needs no address on one host, and that on several the error says what to set."""
    here = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
    host, port = store_address(detect(here), here)
    assert host == "127.0.0.1"
    assert (host, port) == store_address(detect(here | {"OMPI_COMM_WORLD_RANK": "0"}), here)
    with pytest.raises(UsageError, match="set MASTER_ADDR and MASTER_PORT"):
        store_address(detect(OPENMPI), OPENMPI)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mpirun", "source"),
    [(("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe"), "openmpi"), (("mpirun.mpich",), "mpi")],
)
def test_real_mpirun(mpirun: tuple[str, ...], source: str) -> None:
    """Proves the names of the variables against the real launchers, where they are installed."""
    if shutil.which(mpirun[0]) is None:
        pytest.skip(f"{mpirun[0]} is not installed")
    say = "from wbdist.distributed.identity import detect as d; i = d(); print(i.source, i.rank, i.world_size, i.local_rank)"
    done = subprocess.run(
        [*mpirun, "-n", "3", sys.executable, "-c", say], capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(done.stdout.splitlines()) == [f"{source} {rank} 3 {rank}" for rank in range(3)]
