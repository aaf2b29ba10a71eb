"""A job's DDP models, watched: numbers into the rows of its steps, and who the others wait for."""

from __future__ import annotations

import itertools
import socket
from typing import TYPE_CHECKING, Any

from wbdist.hooks import stragglers
from wbdist.hooks.ddp import REDUCE, DdpWatch

if TYPE_CHECKING:
    from wbdist.core.coordination import Coordinator
    from wbdist.job.handle import Job

_REDUCE = {**REDUCE, **stragglers.REDUCE}
_watched = itertools.count()
"""All ranks watch their models in the same order, so it names the same model everywhere."""


def watch(job: Job, peers: Coordinator, model: Any, *, hook: Any, state: Any, detail_every: int) -> stragglers.StragglerWatch:
    """`Job.watch_ddp`; what it returns has to be closed."""
    settings = job.run.settings

    def say(text: str) -> None:
        if job.rank == 0:  # the reduced gradient is the same on all ranks
            settings.say(f"step {job.step}: {text}", warning=True)

    slow = stragglers.StragglerWatch(peers, f"stragglers/{next(_watched)}", settings.host or socket.gethostname(), say)
    try:
        DdpWatch(
            model,
            lambda row: job.log_at_close(row, _REDUCE),
            hook=hook,
            state=state,
            detail_every=detail_every,
            say=say,
            waited=slow.waited,
        )
    except BaseException:
        slow.close()
        raise
    return slow
