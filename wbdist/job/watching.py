"""A job's DDP models, watched: numbers into the rows of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wbdist.hooks.ddp import REDUCE, DdpWatch

if TYPE_CHECKING:
    from wbdist.job.handle import Job


def watch(job: Job, model: Any, *, hook: Any, state: Any, norm_every: int) -> None:
    """`Job.watch_ddp`."""

    def say(text: str) -> None:
        if job.rank == 0:  # the reduced gradient is the same on all ranks
            job.run.settings.say(f"step {job.step}: {text}", warning=True)

    DdpWatch(model, lambda row: job.log(row, reduce=REDUCE), hook=hook, state=state, norm_every=norm_every, say=say)
