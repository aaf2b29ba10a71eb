"""Slurm: a batch script whose one step is the supervised job.

The launcher runs in a step (srun) and not in the batch shell: Slurm signals steps at the beginning of a preemption's
GraceTime, and the batch shell only at its end.
"""

from __future__ import annotations

import shlex

from wbdist.launch.places.wanted import Submission, Wanted

SLACK = 60
"""Slurm sends the --signal up to a minute early or, as it looks only once a minute, that much later than asked for."""


def render(
    wanted: Wanted,
    *,
    time: str | None = None,
    partition: str | None = None,
    cpus: int | None = None,
    extra: tuple[str, ...] = (),
) -> Submission:
    """`time` as in sbatch --time; `extra` are further sbatch options, such as `--account=a`."""
    options = [
        f"--job-name={wanted.name}",
        "--nodes=1 --ntasks=1",
        f"--cpus-per-task={cpus or wanted.nproc}",
        *([f"--gpus={wanted.gpus}"] if wanted.gpus else []),
        *([f"--partition={partition}"] if partition else []),
        *([f"--time={time}"] if time else []),
        # Before the end of the time limit; on preemption Slurm sends SIGTERM by itself.
        f"--signal=USR2@{wanted.grace + SLACK:.0f}",
        "--requeue --open-mode=append",
        f"--output={wanted.name}-%j.log",
        *extra,
    ]
    step = ["srun", "--ntasks=1", f"--cpus-per-task={cpus or wanted.nproc}", *wanted.command(on_preempt="requeue")]
    text = "#!/bin/bash\n" + "".join(f"#SBATCH {option}\n" for option in options) + f"exec {shlex.join(step)}\n"
    return Submission(text=text, filename="slurm.sbatch", commands=(("sbatch", "{file}"),))
