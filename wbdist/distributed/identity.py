"""Which rank this process is: one table over the environment, with a reason that a person can check.

The sources are asked in this order, and the first that speaks decides:

| source          | asked for                                         | why before the next                               |
|-----------------|---------------------------------------------------|---------------------------------------------------|
| `launcher`      | RANK and WBDIST_INCARNATION                       | our own launcher made exactly this process        |
| `torchrun`      | RANK and TORCHELASTIC_RESTART_COUNT               | there may be one torchrun per srun task: finer    |
| `environment`   | RANK (and WORLD_SIZE)                             | torch's `env://`, set by hand or by a platform    |
| `process_group` | an initialised default group, torch loaded before | somebody gave rank and size in code               |
| `slurm`         | SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS | a task of srun; absent in the batch script itself |
| `alone`         | nothing                                           |                                                   |

A process group that is initialised must agree with whatever the environment says: contradictions are refused.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from wbdist.errors import UsageError


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
    """Names the job over requeues (SLURM job, torchrun run id, our launcher's job); '' when nothing does."""
    restart: int = 0
    """Restarts the launcher counted. For people: it does not identify an incarnation (membership changes do not count)."""


def detect(env: Mapping[str, str] | None = None) -> RankIdentity:
    """This process's identity. Any process, any time; reads the environment only, blocks on nothing, imports nothing.

    Raises UsageError when two sources contradict each other, naming both.
    """
    env = os.environ if env is None else env
    group = _process_group()
    found = _from_environment(env)
    if group is not None:
        rank, size = group
        if found is None:
            found = RankIdentity(
                rank=rank,
                world_size=size,
                local_rank=_number(env, "LOCAL_RANK", rank),
                local_world_size=_number(env, "LOCAL_WORLD_SIZE", size),
                source="process_group",
                reason=f"torch.distributed is initialised with rank {rank} of {size}",
            )
        elif (found.rank, found.world_size) != (rank, size):
            raise UsageError(
                f"torch.distributed is initialised as rank {rank} of {size}, but the environment says rank {found.rank} of "
                f"{found.world_size} ({found.reason}); unset the variables that are wrong, or initialise the group with them"
            )
    if found is None:
        found = _from_slurm(env)
    if found is None:
        return RankIdentity(reason="no launcher's variables are set", job_key=_job_key(env))
    _check(found)
    return found


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
    run_id = env.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run_id in ("", "none") else f"torchrun-{run_id}"


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
