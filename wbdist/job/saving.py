"""When a job's checkpoints are made, what they cost, and who is told of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wbdist.checkpoint import manifest
from wbdist.checkpoint.checkpointer import STATE_TIMEOUT, Checkpointer, PendingSave
from wbdist.checkpoint.copying import Elsewhere, Shipping
from wbdist.checkpoint.manifest import Manifest
from wbdist.checkpoint.retention import Keep
from wbdist.distributed.rank_run import RankRun
from wbdist.errors import CheckpointError, UsageError
from wbdist.job import save_metrics
from wbdist.job.accumulation import Group
from wbdist.job.best import BestWatch
from wbdist.job.phases import Phases
from wbdist.job.run_copies import RunCopies
from wbdist.job.telling import PREEMPTION
from wbdist.launch import intent
from wbdist.preemption.budget import SaveCosts

log = logging.getLogger("wbdist.job")

PEER_TIMEOUT = 120.0
"""Seconds a rank waits for its peers where none has more to do than another: start-up (with imports and data loading), end."""
COPY_TIMEOUT = 1800.0
"""Seconds that fetching a checkpoint from `checkpoint_copy` may take at the start, and the last copies at the end."""
BEST = "best"
"""A checkpoint's reason when a metric had its best value yet."""


class Saves:
    """The checkpoints of a job as one rank makes them; of a job without a directory: none, and every call does nothing.

    All ranks, training thread, in step; what waits for peers does so for STATE_TIMEOUT seconds at most, unless told otherwise.
    """

    def __init__(
        self,
        checkpoints: Checkpointer | None,
        runs: RankRun,
        phases: Phases,
        costs: SaveCosts,
        best: BestWatch | None,
        *,
        rank: int,
    ) -> None:
        self._checkpoints = checkpoints
        self._runs = runs
        self._phases = phases
        self._best = best
        self._rank = rank
        self.costs = costs
        self.group = Group()
        """Where the loop is among the batches of one optimizer step."""
        self.tracked = False
        self.committed_step = -1
        """Of the newest checkpoint that stands, as this rank knows."""
        self.saved_step = -1
        self._began = 0.0
        self._pending: PendingSave | None = None
        """The newest save, until its commit was reported."""
        self._directory: Path | None = None
        self._copies: Elsewhere | None = None
        self._shipping: Shipping | None = None

    @property
    def enabled(self) -> bool:
        """Whether the job makes checkpoints at all."""
        return self._checkpoints is not None

    def track(self, shared: Mapping[str, Any], per_rank: Mapping[str, Any], *, settle: Callable[[], object]) -> int | None:
        """Once: these objects are part of every checkpoint, and restored here; the step they are at then, None when it begins.

        `settle` is called before anything is loaded. Raises as `Checkpointer.restore`.
        """
        if self.tracked:
            raise UsageError(
                "job.track() was called twice; pass every object in one call, so that none is restored after another used it"
            )
        self.tracked = True
        if self._checkpoints is None:
            return None
        settle()
        self._checkpoints.track(**shared)
        self._checkpoints.track(per_rank=True, **per_rank)
        with self._phases.during("restore"):
            restored = self._checkpoints.restore(STATE_TIMEOUT)
        if restored is None:
            return None
        for note in restored.notes:
            log.warning("%s", note)
        self.saved_step = self.committed_step = restored.manifest.step
        return restored.manifest.step

    def copy_to(
        self, copies: Elsewhere, directory: Path, *, run_id: str, attempt: int, keep: Keep, chosen: Manifest | None
    ) -> Shipping:
        """Rank 0, not in step: from now on what is committed is copied there. Whoever calls this closes what it returns."""
        run = self._runs.run
        if isinstance(copies, RunCopies):
            copies.bind(run, run_id)
        tier = "run" if copies.through_run else "store"
        self._directory = directory
        self._copies = copies
        self._shipping = Shipping(
            copies,
            directory,
            attempt=attempt,
            keep=keep,
            told=lambda manifest, seconds: run.log_system(save_metrics.of_copy(tier, manifest, seconds)),
        )
        if chosen is not None:
            self._shipping.offer(chosen, base=True)
        return self._shipping

    def hear(self, data: Mapping[str, Any]) -> None:
        """Not in step: a row's values, for `save_best`."""
        if self._best is not None:
            self._best.hear(data)

    def check_config(self) -> None:
        """Before the first step: see `Checkpointer.check_config`."""
        if self._checkpoints is not None:
            self._checkpoints.check_config(self._runs.run.config.as_dict())

    def after_step(self, step: int) -> None:
        """`step` steps are done: saves when that is due and no group of batches is open; else after its last one."""
        if self._pending is not None:
            self.report()
        group = self.group
        if self._checkpoints is not None and self._checkpoints.due(step, STATE_TIMEOUT):
            group.save_is_due = "interval"
        if self._best is not None and self._best.improved(step, PEER_TIMEOUT):
            group.save_is_due = BEST
        if not group.open and (due := group.save_is_due):
            group.save_is_due = ""
            self.save(step, due)

    def save(self, step: int, reason: str, *, block: bool = False, timeout: float | None = None) -> None:
        """Saves, unless the newest save was of this step and nobody wants to wait for it. With `block` it is committed then.

        `timeout` None: STATE_TIMEOUT.
        """
        if self._checkpoints is None:
            return
        if not self.tracked:
            raise UsageError("call job.track(...) before saving: a checkpoint of nothing could not be resumed")
        if self.group.open:
            self._refuse_half_a_group(step, reason)
            return
        if step == self.saved_step and not block:
            return
        timeout = STATE_TIMEOUT if timeout is None else timeout
        with self._phases.during("save"):
            pending = self._checkpoints.save(
                step,
                lambda: self._runs.drain(step - 1, timeout),
                history=self._runs.tail,
                block=block,
                timeout=timeout,
                reason=reason,
                best=None if self._best is None else self._best.saved_with(step, is_the_best=reason == BEST),
                config=self._runs.run.config.as_dict(),
            )
        self._began = time.monotonic() - pending.stall_s + pending.waited_s
        self.report()  # of the save before: that one is done when the next has begun
        self._pending = pending
        self.saved_step = step
        self.report()

    def _refuse_half_a_group(self, step: int, reason: str) -> None:
        problem = (
            f"step {step} is no place to save: the loop was left while job.accumulating was True, and no checkpoint "
            "holds half a gradient. Leave it where job.accumulating is False"
        )
        if reason == PREEMPTION:
            raise CheckpointError(problem)  # the stop goes on, and tells which checkpoint stands
        if reason != "end":
            raise UsageError(problem)
        if self._rank == 0:
            stands = f"the last save was of step {self.saved_step}" if self.saved_step >= 0 else "nothing was saved"
            self._runs.run.settings.say(f"{problem}; {stands}", warning=True)

    def report(self) -> None:
        """Not in step: tells a supervisor of a newly committed checkpoint, so that it knows a job that moves on from one that
        does not, and keeps with the run what it cost."""
        if self._pending is None or not self._pending.done():
            return
        saved, self._pending = self._pending, None
        if saved.durable_at is None:
            return
        self.committed_step = saved.step
        self._runs.run.log_system(save_metrics.of_save(saved))
        self.costs.add(saved.stall_s - saved.waited_s + saved.write_s)
        if self._rank == 0:
            intent.write_progress(saved.step)
            if self._shipping is not None and self._directory is not None:
                self._shipping.offer(manifest.read(self._directory / saved.name))

    # Ending ---------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether every save is reported."""
        return self._pending is None

    def under_way(self) -> float | None:
        """Seconds since the save that is being written began; None when none is."""
        return time.monotonic() - self._began if self._pending is not None and not self._pending.done() else None

    def finish_pending(self, timeout: float) -> None:
        """Waits for the save that is under way. Raises as it does."""
        if self._pending is not None:
            with self._phases.during("save"):
                self._pending.wait(timeout)

    def close(self) -> None:
        """Waits for what is being written. Raises when it cannot be committed."""
        if self._checkpoints is not None:
            with self._phases.during("save"):
                self._checkpoints.close(STATE_TIMEOUT)

    def abandon(self, error: BaseException) -> None:
        """Not in step: the job ends by `error`; nothing waits for peers that may be gone."""
        if self._checkpoints is not None:
            self._checkpoints.__exit__(type(error), error, None)

    def settle_copies(self, timeout: float = COPY_TIMEOUT, *, through_run: bool = False) -> None:
        """Rank 0, last of all: its peers have left, and what is not copied is lost with this machine's disk.

        What leaves by the run's own way is handed over before the run is finished, which then waits for it.
        """
        if self._shipping is None or self._copies is None or self._copies.through_run != through_run:
            return
        if said := self._shipping.settle(timeout):
            self._runs.run.settings.say(said, warning=True)
