"""Which rank this process is: one table over the environment, with a reason that a person can check.

The sources are asked in this order, and the first that speaks decides:

| source          | asked for                                          | why before the next                                 |
|-----------------|----------------------------------------------------|-----------------------------------------------------|
| `pool`          | WBDIST_POOL_WORKER, naming this very process       | a pool's worker inherits its rank's variables       |
| `launcher`      | RANK and WBDIST_INCARNATION                        | our own launcher made exactly this process          |
| `torchrun`      | RANK and TORCHELASTIC_RESTART_COUNT                | there may be one torchrun per MPI or srun task      |
| `environment`   | RANK (and WORLD_SIZE)                              | torch's `env://`, set by hand or by a platform      |
| `process_group` | an initialised default group, torch loaded before  | somebody gave rank and size in code                 |
| `openmpi`       | OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE         | its daemons are tasks of srun: finer                |
| `mpi`           | PMI_RANK, PMI_SIZE (MPICH, Intel MPI, Cray)        | Hydra's proxies are tasks of srun: finer            |
| `slurm`         | SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS  | a task of srun; absent in the batch script itself   |
| `kubernetes`    | JOB_COMPLETION_INDEX and WORLD_SIZE                | a pod is the coarsest place there is                |
| `alone`         | nothing                                            |                                                     |

`srun --mpi=pmi2` sets PMI_RANK as srun's own number; then `slurm` decides, which knows the hosts too. A Kubernetes job's index
without WORLD_SIZE is an array of jobs on their own, and so is a Slurm array.

Contradictions are refused, naming both sides: a process group must agree with what decided, and RANK set by hand with the
number of a launcher that started as many processes as WORLD_SIZE says (RANK exported in the shell that calls mpirun).
`table()` tells what each source said.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from wbdist.errors import UsageError

POOL_WORKER: Final = "WBDIST_POOL_WORKER"
"""`<number>:<pid>` in the environment of a pool's worker. The pid tells it from what inherits its environment."""


class RankIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Where this process stands among the ranks of one incarnation of a job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    source: str = "alone"
    """Row of the module's table that decided."""
    reason: str = ""
    """The variables that decided, with their values."""
    job_key: str = ""
    """Names the job over requeues (Slurm job, torchrun run id, indexed Kubernetes job, our launcher's job); '' when nothing
    does. mpirun gives no name that lasts."""
    slot: int = -1
    """Which of the job's runs is this rank's under per_rank, over elastic restarts (job/slots.py); -1 for its rank's."""
    restart: int = 0
    """Restarts the launcher counted. For people: it does not identify an incarnation (membership changes do not count)."""


class Finding(NamedTuple):
    """What one source of the table says about this process."""

    source: str
    asked: str
    """The variables it goes by."""
    says: str
    """Its answer with the values, '' when it is silent."""
    decides: bool


def detect(env: Mapping[str, str] | None = None) -> RankIdentity:
    """This process's identity. Any process, any time; reads the environment only, blocks on nothing, imports nothing.

    Raises UsageError when two sources contradict each other, naming both.
    """
    env = os.environ if env is None else env
    told = _told(env)
    if not told:
        return RankIdentity(reason="no launcher's variables are set", job_key=_job_key(env))
    found = next(iter(told.values()))
    for other in told.values():
        if "process_group" in {found.source, other.source} and _differ(found, other):
            group, given = (found, other) if found.source == "process_group" else (other, found)
            # Coarser sources may number something else (torchrun on each task, a group of some of the tasks).
            if given.source in _RANK_SET:
                raise UsageError(
                    f"torch.distributed is initialised as rank {group.rank} of {group.world_size}, but the environment says "
                    f"rank {given.rank} of {given.world_size} ({given.reason}); unset the variables that are wrong, or "
                    "initialise the group with them"
                )
        elif found.source == "environment" and found.world_size == other.world_size and _differ(found, other):
            raise UsageError(
                f"two launchers number this process differently: {found.reason} (set by hand or by a platform), but "
                f"{other.reason} ({other.source}); unset RANK and WORLD_SIZE where the processes are started"
            )
    if found.source == "process_group":
        for other in told.values():
            if not _differ(found, other):  # knows the places on this host, too
                places = msgspec.structs.asdict(other)
                found = RankIdentity(**places | {"source": found.source, "reason": found.reason})
    _check(found)
    return found


def table(env: Mapping[str, str] | None = None) -> list[Finding]:
    """What each source says here, in the order in which they are asked. Any process, any time. Raises as `detect`."""
    env = os.environ if env is None else env
    decided, told = detect(env), _told(env)
    rows = [
        Finding(
            source,
            asked,
            f"rank {told[source].rank} of {told[source].world_size}: {told[source].reason}" if source in told else "",
            source == decided.source,
        )
        for source, asked, _ in _SOURCES
    ]
    return [*rows, Finding("alone", "nothing", decided.reason if not told else "", not told)]


def _told(env: Mapping[str, str]) -> dict[str, RankIdentity]:
    """The sources that speak, in order. A pool's worker is its rank's, and no rank itself: then nothing else is asked."""
    told: dict[str, RankIdentity] = {}
    for source, _, read in _SOURCES:
        try:
            found = read(env)
        except UsageError:
            if told:  # half a coarser source: it is not needed
                continue
            raise
        if found is None or found.source != source:
            continue
        told[source] = found
        if source == "pool":
            break
    # srun's own numbers said once more.
    if {"mpi", "slurm"} <= told.keys() and not _differ(told["mpi"], told["slurm"]):
        del told["mpi"]
    return told


def _differ(one: RankIdentity, other: RankIdentity) -> bool:
    return (one.rank, one.world_size) != (other.rank, other.world_size)


def _from_pool(env: Mapping[str, str]) -> RankIdentity | None:
    worker, _, pid = env.get(POOL_WORKER, "").partition(":")
    if pid != str(os.getpid()):  # also what a worker starts itself, such as ranks of its own
        return None
    return RankIdentity(
        source="pool", reason=f"{POOL_WORKER}={worker}:{pid}: a pool's worker is not a rank", job_key=_job_key(env)
    )


def _from_environment(env: Mapping[str, str]) -> RankIdentity | None:
    if "RANK" not in env:
        return None
    if "WORLD_SIZE" not in env:
        raise UsageError(f"RANK={env['RANK']} is set but WORLD_SIZE is not; set both, or neither for a single process")
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if "WBDIST_INCARNATION" in env:
        source = "launcher"
    elif "TORCHELASTIC_RESTART_COUNT" in env:
        source = "torchrun"
    else:
        source = "environment"
    local_size = _number(env, "LOCAL_WORLD_SIZE", size)
    return RankIdentity(
        rank=rank,
        world_size=size,
        local_rank=_number(env, "LOCAL_RANK", rank % max(local_size, 1)),
        local_world_size=local_size,
        node_rank=_number(env, "GROUP_RANK", rank // max(local_size, 1)),
        source=source,
        reason=f"RANK={rank}, WORLD_SIZE={size}",
        job_key=_job_key(env),
        restart=_number(env, "WBDIST_RESTART" if source == "launcher" else "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _from_group(env: Mapping[str, str]) -> RankIdentity | None:
    group = _process_group()
    if group is None:
        return None
    rank, size = group
    return RankIdentity(
        rank=rank,
        world_size=size,
        local_rank=_number(env, "LOCAL_RANK", rank),
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", size),
        source="process_group",
        reason=f"torch.distributed is initialised with rank {rank} of {size}",
        job_key=_job_key(env),
    )


def _from_openmpi(env: Mapping[str, str]) -> RankIdentity | None:
    return _from_mpi(
        env,
        "openmpi",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        # Not OMPI_COMM_WORLD_NODE_RANK: that numbers the processes of a host, over all jobs.
        (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),),
    )


def _from_pmi(env: Mapping[str, str]) -> RankIdentity | None:
    return _from_mpi(
        env,
        "mpi",
        ("PMI_RANK", "PMI_SIZE"),
        (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")),  # Hydra's, Cray's
    )


def _from_mpi(
    env: Mapping[str, str], source: str, names: tuple[str, str], local_names: tuple[tuple[str, str], ...]
) -> RankIdentity | None:
    having = [name for name in names if name in env]
    if not having:
        return None
    if len(having) == 1:
        (missing,) = set(names) - set(having)
        raise UsageError(
            f"{having[0]}={env[having[0]]} is set but {missing} is not; start the job with mpirun, which sets both, or unset it"
        )
    rank, size = _number(env, names[0]), _number(env, names[1])
    # Nothing names the host's number; ranks are placed host by host unless told otherwise.
    local_rank, local_size = next(
        ((_number(env, of), _number(env, among)) for of, among in local_names if of in env and among in env), (rank, size)
    )
    return RankIdentity(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=rank // max(local_size, 1),
        source=source,
        reason=f"{names[0]}={rank}, {names[1]}={size}",
        job_key=_job_key(env),
    )


def _from_slurm(env: Mapping[str, str]) -> RankIdentity | None:
    names = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if any(name not in env for name in names):
        return None
    rank, size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
    node = _number(env, "SLURM_NODEID", 0)
    return RankIdentity(
        rank=rank,
        world_size=size,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        local_world_size=_tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), node, size),
        node_rank=node,
        source="slurm",
        reason=f"SLURM_PROCID={rank}, SLURM_STEP_NUM_TASKS={size}",
        job_key=_job_key(env),
        restart=_number(env, "SLURM_RESTART_COUNT", 0),
    )


def _from_kubernetes(env: Mapping[str, str]) -> RankIdentity | None:
    if "JOB_COMPLETION_INDEX" not in env or "WORLD_SIZE" not in env:
        return None
    index, size = _number(env, "JOB_COMPLETION_INDEX"), _number(env, "WORLD_SIZE")
    return RankIdentity(
        rank=index,
        world_size=size,
        node_rank=index,
        source="kubernetes",
        reason=f"JOB_COMPLETION_INDEX={index}, WORLD_SIZE={size}",
        job_key=_job_key(env),
    )


def _tasks_on_node(described: str, node: int, size: int) -> int:
    """Slurm's `2(x3),1` means 2, 2, 2, 1."""
    counts: list[int] = []
    for part in filter(None, described.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE={described!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else size


def _job_key(env: Mapping[str, str]) -> str:
    if env.get("WBDIST_JOB_KEY"):
        return env["WBDIST_JOB_KEY"]
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"slurm-{env['SLURM_ARRAY_JOB_ID']}-{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    if env.get("SLURM_JOB_ID"):
        return f"slurm-{env['SLURM_JOB_ID']}"
    if env.get("TORCHELASTIC_RUN_ID", "none") not in ("", "none"):
        return f"torchrun-{env['TORCHELASTIC_RUN_ID']}"
    # A pod of an indexed job is called <job>-<index>, also the one that replaces it.
    index, pod = env.get("JOB_COMPLETION_INDEX", ""), env.get("HOSTNAME", "")
    if index and pod.endswith(f"-{index}"):
        return f"kubernetes-{pod.removesuffix(f'-{index}') if 'WORLD_SIZE' in env else pod}"
    return ""


def _process_group() -> tuple[int, int] | None:
    """(rank, size) of an initialised default group; never imports torch."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not getattr(dist, "is_available", bool)() or not dist.is_initialized():
        return None
    return dist.get_rank(), dist.get_world_size()


def _check(found: RankIdentity) -> None:
    for name, value, of, size in (
        ("rank", found.rank, "world size", found.world_size),
        ("local rank", found.local_rank, "local world size", found.local_world_size),
    ):
        if not 0 <= value < size:
            raise UsageError(f"{name} {value} does not fit {of} {size} (source {found.source}: {found.reason})")
    if found.local_world_size > found.world_size:
        raise UsageError(
            f"local world size {found.local_world_size} is larger than world size {found.world_size} "
            f"(source {found.source}: {found.reason})"
        )


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise UsageError(f"{name}={text!r} is not a whole number") from None


_SOURCES: Final[tuple[tuple[str, str, Callable[[Mapping[str, str]], RankIdentity | None]], ...]] = (
    ("pool", POOL_WORKER, _from_pool),
    ("launcher", "RANK, WORLD_SIZE, WBDIST_INCARNATION", _from_environment),
    ("torchrun", "RANK, WORLD_SIZE, TORCHELASTIC_RESTART_COUNT", _from_environment),
    ("environment", "RANK, WORLD_SIZE", _from_environment),
    ("process_group", "torch.distributed", _from_group),
    ("openmpi", "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE", _from_openmpi),
    ("mpi", "PMI_RANK, PMI_SIZE", _from_pmi),
    ("slurm", "SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS", _from_slurm),
    ("kubernetes", "JOB_COMPLETION_INDEX, WORLD_SIZE", _from_kubernetes),
)
"""name, what it goes by, and who reads it; the first that speaks decides."""
_RANK_SET: Final = {"launcher", "torchrun", "environment"}
"""Sources that speak of exactly this process."""
