"""Slurm: a batch script whose one step is the supervised job, with one launcher on each node.

The launcher runs in a step (srun) and not in the batch shell: Slurm signals steps at the beginning of a preemption's
GraceTime, and the batch shell only at its end.
"""

from __future__ import annotations

import shlex

from wbdist.launch.places.wanted import Submission, Wanted

ENDPOINT = "ENDPOINT"
"""Stands for what the batch shell makes of the nodes' names."""
STAY = "--kill-on-bad-exit=0"
"""A launcher that leaves must not take along the one that asks for the requeue, or waits for a lost node."""
SLACK = 60
"""Slurm sends the --signal up to a minute early or, as it looks only once a minute, that much later than asked for."""


def render(
    wanted: Wanted,
    *,
    time: str | None = None,
    partition: str | None = None,
    cpus: int | None = None,
    nodes: int = 1,
    extra: tuple[str, ...] = (),
) -> Submission:
    """`time` as in sbatch --time; `extra` are further sbatch options, such as `--account=a`. With several `nodes`, ranks, CPUs
    and GPUs are each node's."""
    several = nodes > 1
    options = [
        f"--job-name={wanted.name}",
        f"--nodes={nodes} --ntasks-per-node=1" if several else "--nodes=1 --ntasks=1",
        f"--cpus-per-task={cpus or wanted.nproc}",
        *([f"--gpus{'-per-node' if several else ''}={wanted.gpus}"] if wanted.gpus else []),
        *([f"--partition={partition}"] if partition else []),
        *([f"--time={time}"] if time else []),
        # Before the end of the time limit; on preemption Slurm sends SIGTERM by itself.
        f"--signal=USR2@{wanted.grace + SLACK:.0f}",
        "--requeue --open-mode=append",
        f"--output={wanted.name}-%j.log",
        *extra,
    ]
    text = "#!/bin/bash\n" + "".join(f"#SBATCH {option}\n" for option in options)
    tasks = ["--ntasks-per-node=1", STAY] if several else ["--ntasks=1"]
    where = ("--nnodes", str(nodes), "--rdzv-endpoint", ENDPOINT) if several else ()
    step = ["srun", *tasks, f"--cpus-per-task={cpus or wanted.nproc}", *wanted.command(*where, on_preempt="requeue")]
    if several:
        text += 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
    text += f"exec {shlex.join(step)}\n".replace(ENDPOINT, '"$head:$((20000 + SLURM_JOB_ID % 10000))"')
    name = "slurm-nodes.sbatch" if several else "slurm.sbatch"
    return Submission(text=text, filename=name, commands=(("sbatch", "{file}"),))
