"""Saving a job's state without stopping it, and getting it back whole.

    with Checkpointer("ckpt", coordinator, attempt=claim.attempt.number) as checkpoints:
        checkpoints.track(model=model, optimizer=opt, data=loader)
        restored = checkpoints.restore(timeout=120)             # None: start from nothing
        ...
        checkpoints.maybe_save(step)                            # all ranks, after each step; `save` does it in any case

How a save becomes a checkpoint: `commit.py`; what a checkpoint is: `manifest.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wbdist.checkpoint import changes
from wbdist.checkpoint import restore as restoring
from wbdist.checkpoint.best import Best
from wbdist.checkpoint.capture import Captured, capture
from wbdist.checkpoint.changes import Allowed
from wbdist.checkpoint.commit import Committed, SaveRequest, clear_away, run_save
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.history import Kept
from wbdist.checkpoint.manifest import Manifest, directory_name
from wbdist.checkpoint.policy import Cost, SavePolicy, Schedule, observed_mtbf
from wbdist.checkpoint.restore import Choice, Restored, Surroundings
from wbdist.checkpoint.retention import Keep
from wbdist.checkpoint.staging import Arena, Staged
from wbdist.checkpoint.tracked import Stateful, TrackedObjects
from wbdist.checkpoint.verdict import Failure
from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition, Watermark
from wbdist.core.tails import JournalPrefix
from wbdist.errors import CheckpointError, DeadlineError, Error, UsageError

STATE_TIMEOUT = 1800.0
"""Seconds for what takes as long as the state is big or the disk slow (save, verify, restore), and for a rank that does
something alone between two steps (an evaluation): as long as a collective may take. Who dies meanwhile is the launcher's to
notice."""

ABANDON_AFTER = 5.0
"""Seconds that leaving the `with` block by an error waits for a save in the background: its peers may be gone."""


GRACE = 2.0
"""Seconds that a blocking save waits beyond its timeout for the background to say what was missing."""


class PendingSave:
    """A save under way, or done. Any thread may ask."""

    def __init__(self, step: int, attempt: int) -> None:
        self.step = step
        self.attempt = attempt
        self.stall_s = 0.0
        """Seconds the training thread was held by `save`: waiting for the save before, and staging."""
        self.waited_s = 0.0
        """The part of `stall_s` that was waiting for the save before."""
        self.staged_bytes = 0
        """Bytes of the files that this rank's tensors were copied into."""
        self.bytes = 0
        """Bytes this rank wrote; 0 until it is done."""
        self.write_s = 0.0
        """Seconds from the end of staging to the commit; 0 until it is done."""
        self.durable_at: float | None = None
        """Unix seconds at which the checkpoint was committed; None before, and for a failed save."""
        self.error: Error | None = None
        """Why it failed, else None."""
        self._done = threading.Event()
        self._raised = False

    @property
    def name(self) -> str:
        """Directory name of the checkpoint."""
        return directory_name(self.step, self.attempt)

    def done(self) -> bool:
        """Whether it is committed or has failed. Does not block."""
        return self._done.is_set()

    def wait(self, timeout: float) -> None:
        """Returns once the checkpoint is committed on disk; at most `timeout` seconds.

        Raises the save's own error, or DeadlineError when it is still under way.
        """
        if not self._done.wait(timeout):
            raise DeadlineError(f"checkpoint {self.name} is still being written after {timeout:g} s")
        if self.error is not None:
            self._raised = True
            raise self.error


class Checkpointer:
    """Saves and restores the tracked objects of one job. Made on the training thread of every rank; a context manager.

    A save that is in the background when the interpreter exits without `close` is abandoned: it never becomes visible.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        coordinator: Coordinator,
        *,
        attempt: int,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: str | None = None,
        config: Mapping[str, Any] | None = None,
        config_changes: str | Iterable[str] = "error",
        environment_changes: str | Iterable[str] = "error",
        seed: int = 0,
        save_every: str | int | None = None,
        layer: FileLayer | None = None,
    ) -> None:
        """Touches neither disk nor peers.

        `directory` must be the same, shared one on all ranks. `attempt` is this life of the job, from 1; a newer attempt
        in the directory fences this one off. The newest `keep_last` committed checkpoints stay, those of
        every `keep_every` steps, the one with the best metric (`loss`, `max:accuracy`), and the one restored from. `seed` seeds
        the generators of ranks that a checkpoint made by fewer ranks does not know. `config` is told in the manifest; a restore
        refuses another one, or other switches of torch, but for what `config_changes` and `environment_changes` name
        ("allow": any; see changes.py). `save_every` is for `due` and `maybe_save`: steps (50,
        "50 steps"), a time ("10 minutes"), or "auto" for the interval that loses the least, from what saves cost and how often
        this job has failed.
        """
        policy = SavePolicy.parse(save_every)
        if attempt < 1:
            raise UsageError(f"attempt={attempt}: attempts are numbered from 1")
        self._keep = Keep(keep_last, keep_every, keep_best)
        self._keep.check()
        self.directory = Path(directory).absolute()
        self._coordinator = coordinator
        self._background = coordinator.clone()
        self._attempt = attempt
        self._surroundings = Surroundings(
            changes.normal(config or {}),
            Allowed.parse(config_changes, "config_changes"),
            Allowed.parse(environment_changes, "environment_changes"),
        )
        self._seed = seed
        self._layer = layer or FileLayer()
        self._objects = TrackedObjects()
        self._arena = Arena()
        self._schedule = Schedule(policy, coordinator, lambda: observed_mtbf(self.directory)) if policy else None
        self._choice: Choice | None = None
        self._restored: Restored | None = None
        self._serial = 0
        self._config_checks = 0
        self._last: PendingSave | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._kept = Kept()
        """What this rank put of the history into its last committed checkpoint."""

    def track(self, *, per_rank: bool = False, **stateful: Any) -> None:
        """Adds objects under their names: anything with state_dict() and load_state_dict(). All ranks, the same names.

        Objects that all ranks hold alike (models, optimizers, schedulers, loaders) are saved once; with `per_rank=True` each
        rank saves its own, and metrics of torchmetrics in any case. The random generators of every rank are always saved. DDP
        and compiled modules are tracked as the module inside. Raises UsageError for a name or object that is tracked already
        or has no state.
        """
        for name, value in stateful.items():
            self._objects.add(name, value, per_rank=per_rank)

    def choose(self, timeout: float) -> Manifest | None:
        """The checkpoint that `restore` will load: the newest that verifies, agreed by all ranks; None when there is none.

        All ranks, in step; blocks at most `timeout` seconds, on rank 0 for as long as reading the files takes. Bad
        checkpoints are moved to `quarantine/` and leftovers of dead attempts removed. Calling it again returns the same. Raises
        FencedError when a newer attempt owns the directory, PeerLostError when rank 0 does not answer.
        """
        if self._choice is None:
            self._choice = restoring.choose(self._coordinator, self._layer, self.directory, self._attempt, timeout)
        return self._choice.manifest

    def restore(self, timeout: float = STATE_TIMEOUT) -> Restored | None:
        """Loads the chosen checkpoint (see `choose`) into every tracked object and this rank's random generators.

        All ranks, in step, once, after `track`, on the training thread; blocks at most `timeout` seconds. None when there is
        no checkpoint. Raises on all ranks alike: StateMissingError when names or states do not fit, ConfigError when config or
        torch's switches have changed (then nothing was touched), CheckpointError when a rank cannot read it, PeerLostError
        naming missing ranks.
        """
        if self._restored is not None:
            raise UsageError(f"{self._restored.manifest.name} was restored already; restore once, after everything is tracked")
        self._surroundings.facts()
        deadline = time.monotonic() + timeout
        if self.choose(timeout) is None:
            return None
        assert self._choice is not None
        self._restored = restoring.load_all(
            self._coordinator,
            self._objects,
            self._choice,
            seed=self._seed,
            surroundings=self._surroundings,
            timeout=max(0.0, deadline - time.monotonic()),
        )
        return self._restored

    def check_config(self, config: Mapping[str, Any], timeout: float = STATE_TIMEOUT) -> None:
        """All ranks, in step, after `restore`: rank 0's `config`, the run's as it is now, has no other values for keys that
        were set after the start, too, when the restored checkpoint was made; without one, nothing is compared.

        Blocks at most `timeout` seconds. Raises ConfigError, on all ranks.
        """
        if self._restored is not None:
            self._config_checks += 1
            name = f"ckpt/config/{self._config_checks}"
            restoring.check_later(
                self._coordinator,
                name,
                self._restored.manifest,
                here=self._surroundings,
                config=config,
                timeout=timeout,
            )

    def save(
        self,
        step: int,
        position: RunPosition | Callable[[], RunPosition] | None = None,
        *,
        history: Callable[[], Sequence[JournalPrefix]] | None = None,
        block: bool = False,
        timeout: float = STATE_TIMEOUT,
        reason: str = "",
        best: Best | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> PendingSave:
        """Saves the state after `step`. All ranks, in step, on the training thread, at a step boundary.

        Returns once the state is copied (`block=False`), or committed and older ones removed (`block=True`). Saves never
        overlap: one that is still in the background is waited for first. Skipping instead would have to be agreed by all
        ranks, each save anew, or one rank would write a checkpoint that the others do not.

        `position` says where this rank's run stood after `step`. A callable is called on a background thread, on every rank,
        once its part is written, and may block on its peers; it must answer for `step`, not for the moment of the call.

        None: there is no run.

        `history` is called after it, on the same thread: the journals that this rank puts into the checkpoint, up to the
        position, since losing this machine would lose them. `best` is kept in the manifest, for `keep_best`, and so is
        what `config`, the run's as it is now, has besides what the job was started with (see `check_config`).

        `timeout` seconds bound the whole save. Raises what the previous save failed with (once; then saving goes on),
        UsageError for a state that cannot be stored, and with `block=True` what this save failed with: the error of any rank on
        all of them, PeerLostError naming ranks that did not call `save`. Saving a step again returns the first save of it.
        """
        if self._closed:
            raise UsageError("the checkpointer is closed")
        if step < 0:
            raise UsageError(f"step={step}: steps are counted from 0")
        started = time.monotonic()
        if self._last is not None and self._last.step == step and self._last.error is None:
            if block:
                self._last.wait(timeout)
            return self._last
        self.wait(timeout)
        pending = PendingSave(step, self._attempt)
        pending.waited_s = time.monotonic() - started
        failure, error, captured, staged = None, None, Captured(), Staged()
        try:
            captured = capture(self._objects, self._coordinator.rank, self._coordinator.world_size)
            staged = self._arena.stage(captured.layouts, captured.samples)
            pending.staged_bytes = sum(layout.size for layout in captured.layouts)
        except Exception as problem:  # noqa: BLE001  (the peers are told first; raised below)
            error, failure = problem, Failure.of(self._coordinator.rank, problem)
        self._serial += 1
        request = SaveRequest(
            serial=self._serial,
            step=step,
            attempt=self._attempt,
            directory=self.directory,
            shared=tuple(sorted(self._objects.shared)),
            per_rank=tuple(sorted(self._objects.per_rank)),
            parts=captured.parts,
            staged=staged,
            sampled=captured.sampled,
            position=position or RunPosition("", "", "", Watermark(self._attempt, {}, step - 1)),
            history=history,
            kept=self._kept,
            reason=reason,
            best=best,
            config=self._surroundings.config,
            set_later=changes.set_later(self._surroundings.config, config or {}),
            environment=self._surroundings.facts(),
            kinds=self._objects.kinds(),
            keep=self._keep,
            protected=None if self._choice is None or self._choice.manifest is None else self._choice.manifest.name,
            failure=failure,
        )
        self._last = pending
        # A daemon: an interpreter that exits must not hang on peers that are gone. `close` is what waits.
        self._thread = threading.Thread(
            target=self._finish, args=(pending, request, started + timeout), name=f"wbdist-{pending.name}", daemon=True
        )
        self._thread.start()
        try:
            staged.copy()  # what is copied is written at once
        except Exception as problem:  # noqa: BLE001  (the background tells the peers; raised below)
            error = problem
        pending.stall_s = time.monotonic() - started
        if error is not None:
            self._thread.join(timeout)
            pending._raised = True  # noqa: SLF001  (raised right here)
            raise error
        if block:
            # Longer than the save may take, so that its own error is heard, which names the rank.
            pending.wait(max(0.0, started + timeout - time.monotonic()) + GRACE)
            self._thread.join(max(0.0, started + timeout - time.monotonic()))
        return pending

    def due(self, step: int, timeout: float = STATE_TIMEOUT) -> bool:
        """Whether `save_every` asks for a save after `step`; the same answer on all ranks. Training thread, after each step.

        Costs nothing at most steps; see `Schedule.due`. Raises PeerLostError when rank 0, which decides, is gone.
        """
        if self._schedule is None:
            return False
        last = self._last
        known = last is not None and last.durable_at is not None
        cost = Cost(last.stall_s - last.waited_s, last.stall_s + last.write_s) if last is not None and known else Cost()
        return self._schedule.due(step, cost, timeout)

    def maybe_save(self, step: int, position: RunPosition | Callable[[], RunPosition] | None = None) -> PendingSave | None:
        """`save` when it is `due`, in the background; else None. All ranks, after each step; raises as both do."""
        return self.save(step, position, reason="interval") if self.due(step) else None

    def wait(self, timeout: float) -> None:
        """Returns when no save is in the background, nor the removal of older ones after it; at most `timeout` seconds.

        Raises the error of a failed save that nobody has seen yet, or DeadlineError naming the save.
        """
        deadline = time.monotonic() + timeout
        if self._last is not None and not self._last._raised:  # noqa: SLF001  (two halves of one thing)
            self._last.wait(timeout)
        if self._thread is not None and self._last is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                raise DeadlineError(f"after {self._last.name} older checkpoints are still being removed after {timeout:g} s")

    def close(self, timeout: float = STATE_TIMEOUT) -> None:
        """Waits for the save in the background and lets go of the peers. Idempotent. Raises as `wait` does."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait(timeout)
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
            return
        # The error that is under way matters more than the save's; give a healthy save a moment, no more.
        self._closed = True
        if self._thread is not None:
            self._thread.join(ABANDON_AFTER)
        self._release()

    def _release(self) -> None:
        # A thread that still waits for its peers uses the connection; the process is about to end then.
        if self._thread is None or not self._thread.is_alive():
            self._background.close()

    def _finish(self, pending: PendingSave, request: SaveRequest, deadline: float) -> None:
        started = time.monotonic()
        committed: Committed | None = None
        try:
            committed = run_save(self._background, self._layer, request, deadline)
            pending.bytes, pending.durable_at = committed.bytes, committed.durable_at
            self._kept = committed.kept
        except Error as error:
            pending.error = error
        except Exception as error:  # noqa: BLE001  (kept, and raised by the next call)
            what = f"{type(error).__name__}: {error}"
            pending.error = CheckpointError(f"the checkpoint of step {request.step} was not committed: {what}")
            pending.error.__cause__ = error
        finally:
            pending.write_s = time.monotonic() - (request.staged.copied_at or started)
            pending._done.set()  # noqa: SLF001  (two halves of one thing)
        if committed is not None:
            clear_away(self._coordinator.rank, self._layer, request)


__all__ = ["Checkpointer", "PendingSave", "Restored", "Stateful"]
