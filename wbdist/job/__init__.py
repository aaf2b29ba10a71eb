"""A resumable, tracked, preemption-tolerant training job: the one place where the mechanisms meet.

`job()` joins rank identity, the run, the checkpointer, the preemption notices and the data order, and owns the order in
which they act:

    enter     identity -> coordinator -> claim the directory -> choose a checkpoint -> open the run at its position
    track     restore the tracked objects (when a checkpoint was chosen)
    a step    agree to go on -> the user's body -> close the row -> count -> save when due
    a notice  all ranks stop before the same step -> mark preempting -> save -> exit 75
    leave     save -> drain the history -> finish the run -> say the verdict

Decisions (which attempt, which checkpoint, where to stop) are made once and agreed through the coordinator; there is no
collective besides DDP's own.
"""

from __future__ import annotations

from wbdist.job.create import job
from wbdist.job.ending import Preempted
from wbdist.job.handle import Job

__all__ = ["Job", "Preempted", "job"]
