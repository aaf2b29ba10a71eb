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

import logging
import os
import random
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import msgspec

from wbdist.checkpoint.checkpointer import Checkpointer, PendingSave
from wbdist.checkpoint.claim import Claim
from wbdist.checkpoint.manifest import Manifest
from wbdist.core.mixing import mix64
from wbdist.core.position import RunPosition
from wbdist.distributed import bootstrap, coordination, strategies
from wbdist.distributed.identity import detect
from wbdist.errors import EXIT_PREEMPTED, EXIT_RETRYABLE, Error, PeerLostError, UsageError
from wbdist.launch import intent
from wbdist.preemption.agreement import StopAgreement
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.signals import SignalSource
from wbdist.run.handle import Run
from wbdist.run.init import make_spec
from wbdist.run.lifecycle import RunSpec
from wbdist.settings import resolve

if TYPE_CHECKING:
    from torch import nn

    from wbdist.hooks.loader import ResumableLoader

log = logging.getLogger("wbdist.job")

PEER_TIMEOUT = 120.0
"""Seconds a rank waits for its peers where all act in step: start-up (with imports and data loading), save, end."""
COLLECTIVE_TIMEOUT = 1800.0
"""Seconds one collective of the training script may take, torch's own default: one rank may evaluate while others wait."""
STOP_TIMEOUT = 20.0
"""Seconds for all ranks to say where they are after a notice; one that does not is taken for dead. Below torchrun's 30 s."""

_END_OF_EPOCH = object()
_LEDGER_REDUCE = {"samples": "sum53", "epoch": "first"}
"""Fingerprints of the ranks' shares add up (modulo 2**53) to the one of the step, whatever the number of ranks."""

Strategy = Literal["auto", "rank0", "per_rank"]


class Preempted(SystemExit):
    """Raised inside `job.steps` on every rank after a notice; leaves the `with` block, and the process with code 75.

    A SystemExit, so that a script need not know of it, `except Exception` does not swallow it, and code after the loop
    (evaluation, export) does not run on a half-trained model within somebody's 30 seconds of grace.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.reason = reason


class SaveEvery(msgspec.Struct, frozen=True):
    """When to save periodically."""

    steps: int

    @classmethod
    def parse(cls, value: str | int | None) -> SaveEvery | None:
        """`50`, `"50 steps"`, or None for no periodic saves. Raises UsageError for anything else."""
        if value is None:
            return None
        match = re.fullmatch(r"\s*(\d+)\s*(steps?)?\s*", str(value))
        if isinstance(value, bool) or match is None or int(match[1]) == 0:
            raise UsageError(
                f'save_every={value!r} is not understood; give a positive number of steps such as 50 or "50 steps", or None'
            )
        return cls(int(match[1]))


class _Plan(msgspec.Struct, frozen=True):
    """What rank 0 decides at the start and every rank follows."""

    run_id: str
    attempt: int
    nonce: str
    cause: str


class Job:
    """Handle of a job on one rank; make it with `job()` and use it as a context manager on the main thread of every rank."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        run_id: str | None,
        checkpoint_dir: Path | None,
        save_every: SaveEvery | None,
        keep_last: int,
        strategy: Strategy,
        seed: int,
    ) -> None:
        """Use `job()`. `spec` is the run's; its id counts only when `run_id` asked for it."""
        self._spec = spec
        self._id = run_id
        self._directory = checkpoint_dir
        self._save_every = save_every
        self._keep_last = keep_last
        self._strategy = strategy
        self._seed = seed
        self._step = 0
        self._saved_step = -1
        self._checkpoints: Checkpointer | None = None
        self._pending: PendingSave | None = None
        """The newest save, until its commit was reported."""
        self._chosen: Manifest | None = None
        self._tracked = False
        self._in_steps = False
        self._open_step: ResumableLoader | None = None
        """The loader of a step whose body was entered and which is not counted yet."""
        self._own_group = False
        self._stack = ExitStack()

    # Facts ----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self._identity.rank

    @property
    def world_size(self) -> int:
        return self._identity.world_size

    @property
    def attempt(self) -> int:
        """Which life of the job this is, from 1; the same on all ranks."""
        return self._plan.attempt

    @property
    def step(self) -> int:
        """Training steps completed, over all attempts; inside the loop body also the `_step` of the row being logged."""
        return self._step

    @property
    def run(self) -> Run:
        """This rank's run handle (under strategy rank0, its feed into the one run)."""
        return self._runs.run

    @property
    def config(self) -> Any:
        """The run's config; keys are attributes."""
        return self._runs.run.config

    @property
    def summary(self) -> Any:
        """The run's summary; under strategy rank0 only rank 0's entries are kept."""
        return self._runs.run.summary

    # Life -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """All ranks, in step, on the main thread. Blocks until all ranks are here, at most PEER_TIMEOUT seconds a wait.

        Afterwards the attempt and its checkpoint are decided and the same on all ranks, the run is open and signals
        are watched. Raises JobAlreadyRunningError, CheckpointError, PeerLostError, UsageError; nothing is left open then.
        """
        bootstrap.check_main_guard()
        try:
            self._open()
        except BaseException as error:
            self._say_verdict(error)
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        self._identity = detect()
        self._peers = coordination.connect(self._identity, os.environ.get("WBDIST_INCARNATION"), timeout=PEER_TIMEOUT)
        self._stack.callback(self._peers.close)
        self._plan = self._agree_on_plan()
        # All ranks are here (they agreed on the plan), so forming takes no time; what counts is how long a collective may last.
        self._own_group = coordination.init_process_group(
            self._identity, incarnation=self._plan.nonce, timeout=COLLECTIVE_TIMEOUT
        )
        seed_everything(self._seed, self.rank)

        position = None
        if self._directory is not None:
            self._checkpoints = Checkpointer(
                self._directory, self._peers, attempt=self.attempt, keep_last=self._keep_last, seed=self._seed
            )
            self._chosen = self._checkpoints.choose(PEER_TIMEOUT)
            position = None if self._chosen is None else self._chosen.runs[min(self.rank, len(self._chosen.runs) - 1)]

        # Signals are watched before the run is announced: whoever sees the run may preempt the job.
        self._hub = NoticeHub([SignalSource()])
        self._hub.start()
        self._stack.callback(self._hub.close)
        self._agreement = StopAgreement(self._peers, self._hub, timeout=STOP_TIMEOUT)
        self._stack.callback(self._agreement.close)
        self._runs = strategies.open_runs(self._strategy, self._identity, self._peers, self._run_spec(position))

    def _agree_on_plan(self) -> _Plan:
        """Rank 0 claims the directory; its success, or its error, becomes everybody's."""
        answer: dict[str, Any] = {}
        if self.rank == 0:
            try:
                answer = {"plan": msgspec.to_builtins(self._decide())}
            except Error as error:
                refusal = {"error": str(error), "exit_code": error.exit_code}
                self._peers.agree("job/plan", msgspec.json.encode(refusal), PEER_TIMEOUT)
                raise
        told = self._peers.agree("job/plan", msgspec.json.encode(answer) if self.rank == 0 else None, PEER_TIMEOUT)
        answer = msgspec.json.decode(told)
        if "error" in answer:
            refused = Error(f"rank 0 could not start the job: {answer['error']}")
            refused.exit_code = int(answer["exit_code"])
            raise refused
        return msgspec.convert(answer["plan"], _Plan)

    def _decide(self) -> _Plan:
        cause = os.environ.get("WBDIST_CAUSE", "")
        if self._directory is None:
            return _Plan(self._spec.run_id, 1, secrets.token_hex(8), cause or "start")
        spec = self._spec
        claim = Claim.take(
            self._directory,
            run_id=self._id,
            project=spec.project,
            entity=spec.entity,
            name=spec.name,
            cause=cause,
            timeout=spec.settings.claim_timeout,
        )
        self._stack.callback(claim.release)
        return _Plan(claim.job.run_id, claim.attempt.number, claim.attempt.nonce, claim.attempt.cause)

    # The parts a training script uses -------------------------------------------------------------------

    def ddp(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """All ranks, in step, before `track`: the model wrapped in DistributedDataParallel; with one rank, the model itself.

        `kwargs` go to DistributedDataParallel. It broadcasts rank 0's parameters, so all ranks start alike.
        """
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, **kwargs)

    def loader(self, dataset: Any, batch_size: int, **kwargs: Any) -> ResumableLoader:
        """All ranks, with the same arguments: batches of this rank's share of `dataset`, shuffled anew each epoch.

        `batch_size` is per rank. The order depends on the job's seed and the epoch alone, and the position counts samples
        consumed by all ranks, so a resumed job continues it with any number of ranks or workers. `kwargs` as for
        ResumableLoader (num_workers, tail, collate_fn, ...).
        """
        from wbdist.hooks.loader import ResumableLoader

        kwargs.setdefault("seed", self._seed)
        return ResumableLoader(dataset, batch_size, rank=self.rank, world_size=self.world_size, **kwargs)

    def track(self, **stateful: Any) -> None:
        """All ranks, in step, once, before `steps`: these objects are saved with every checkpoint, and restored here and now.

        Anything with state_dict() and load_state_dict(). Blocks while the checkpoint is read. Raises StateMissingError
        when the checkpoint was made with other names, CheckpointError when it cannot be read.
        """
        if self._tracked:
            raise UsageError(
                "job.track() was called twice; pass every object in one call, so that none is restored after another used it"
            )
        self._tracked = True
        if self._checkpoints is None:
            return
        self._checkpoints.track(**stateful)
        restored = self._checkpoints.restore(PEER_TIMEOUT)
        if restored is not None:
            self._step = self._saved_step = restored.manifest.step
            for note in restored.notes:
                log.warning("%s", note)

    def steps(self, data: ResumableLoader, *, epochs: int) -> Iterator[Any]:
        """All ranks, in step: yields this rank's batches until `epochs` epochs are done, over all attempts.

        Between two batches it closes the step's row, saves when due, and agrees with the other ranks whether to go on. On a
        notice it saves and raises Preempted on every rank before the same step. Ends with a checkpoint of the final state. A
        `break` counts the step it leaves as done.
        """
        from wbdist.hooks.loader import ResumableLoader

        if not isinstance(data, ResumableLoader):
            raise UsageError(
                f"job.steps() needs a loader with a position; got {type(data).__name__}. Make it with job.loader(dataset, ...)"
            )
        if self._checkpoints is not None and not self._tracked:
            raise UsageError(
                "call job.track(model=..., optimizer=..., data=...) before job.steps(): nothing would be saved or restored"
            )
        if self._in_steps:
            raise UsageError("job.steps() is running already; a job has one loop over its steps at a time")
        self._close_step()
        self._in_steps = True
        try:
            while data.epoch < epochs:
                batches = iter(data)
                while True:
                    # Before the batch is asked for: the loader's position counts it as soon as it is handed out.
                    self._stop_if_told()
                    batch = next(batches, _END_OF_EPOCH)
                    if batch is _END_OF_EPOCH:
                        break
                    self._open_step = data
                    yield batch
                    self._close_step()
        finally:
            # A `break` and an exception in the body look alike from in here (GeneratorExit), so the open step is left
            # open: the next call on the job closes it, and leaving the job by an exception forgets it.
            self._in_steps = False
        self._save("end")

    def log(self, data: Mapping[str, Any], *, reduce: str | Mapping[str, str] = "mean", step: int | None = None) -> None:
        """All ranks, any thread: adds to the row of the current step. Durable on this rank's disk when it returns; never
        waits for a peer, a server or the disk's queue.

        `reduce` ("mean", "sum", "min", "max", ... or one per key) says what becomes of the ranks' values under strategy rank0.
        """
        if not self._in_steps:
            self._close_step()
        self._runs.log(data, step=self._step if step is None else step, reduce=reduce)

    def save(self) -> None:
        """All ranks, in step, between steps: saves now and waits until the checkpoint is committed."""
        if self._in_steps:
            raise UsageError(
                "job.save() was called inside the loop, where a step is half done; use save_every, or call it after the loop"
            )
        self._close_step()
        self._save("request", block=True)

    # Step boundaries ------------------------------------------------------------------------------------

    def _stop_if_told(self) -> None:
        if self._agreement.begin_unit():
            return
        notice = self._agreement.notice
        reason = "a notice" if notice is None else f"{notice.source}: {notice.reason}"
        if not self._agreement.agreed:
            raise PeerLostError(
                f"rank {self.rank} was told to stop ({reason}), but not all ranks answered within {STOP_TIMEOUT:.0f} s: "
                f"{self._agreement.missing}. Nothing was saved now; the last committed checkpoint stands."
            )
        self._runs.run.mark_preempting()
        self._save("preemption", block=True)
        raise Preempted(reason)

    def _close_step(self) -> None:
        """Counts the step that is open, if any; all ranks, in step."""
        data, self._open_step = self._open_step, None
        if data is None:
            return
        self._runs.log({"samples": data.fingerprint(), "epoch": data.epoch}, step=self._step, reduce=_LEDGER_REDUCE)
        self._runs.commit_row()
        self._step += 1
        if self._pending is not None:
            self._report_progress()
        if self._save_every is not None and self._step % self._save_every.steps == 0:
            self._save("interval")

    def _save(self, reason: str, *, block: bool = False) -> None:
        if self._checkpoints is None:
            return
        if not self._tracked:
            raise UsageError("call job.track(...) before saving: a checkpoint of nothing could not be resumed")
        step = self._step
        if step == self._saved_step and not block:
            return
        self._report_progress()
        self._pending = self._checkpoints.save(
            step, lambda: self._runs.drain(step - 1, PEER_TIMEOUT), block=block, timeout=PEER_TIMEOUT, reason=reason
        )
        self._saved_step = step
        self._report_progress()

    def _report_progress(self) -> None:
        """Tells a supervisor of a newly committed checkpoint, so that it knows a job that moves on from one that does not."""
        if self._pending is not None and self._pending.done():
            if self.rank == 0 and self._pending.durable_at is not None:
                intent.write_progress(self._pending.step)
            self._pending = None

    # Leaving --------------------------------------------------------------------------------------------

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """All ranks. Without an error: in step; the last save is waited for, the run is finished, its rows acknowledged or
        left to the shipper. With one: within seconds, without waiting for peers that may be gone.
        """
        try:
            if error is None:
                self._leave_finished()
            elif isinstance(error, Preempted):
                self._leave_preempted()
            else:
                self._leave_failed(error)
        except BaseException as problem:
            self._say_verdict(problem)
            raise
        else:
            self._say_verdict(error)
        finally:
            self._stack.close()

    def _leave_finished(self) -> None:
        self._close_step()
        if self._tracked:
            self._save("end")
        if self._checkpoints is not None:
            self._checkpoints.close(PEER_TIMEOUT)
        self._runs.finish(0)
        self._leave_group()

    def _leave_preempted(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close(PEER_TIMEOUT)
        self._runs.finish(EXIT_PREEMPTED)
        self._leave_group()

    def _leave_group(self) -> None:
        """Only where all ranks leave well: taking a group apart may wait for peers, and after a failure they are gone."""
        if self._own_group:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _leave_failed(self, error: BaseException) -> None:
        self._open_step = None
        if self._checkpoints is not None:
            self._checkpoints.__exit__(type(error), error, None)
        self._runs.finish(exit_code_of(error))

    def _say_verdict(self, error: BaseException | None) -> None:
        """Leaves this rank's verdict where a supervisor looks; a launcher may hide or flatten the exit code."""
        code = exit_code_of(error)
        message = "" if error is None else f"{type(error).__name__}: {error}"
        if isinstance(error, Preempted):
            message = error.reason
        rank = int(os.environ.get("RANK", "0"))
        try:
            intent.write(rank, intent.Verdict(intent.word_for(code), code, message[:2000]))
        except OSError as problem:
            log.warning("rank %d could not leave its verdict for the supervisor: %s", rank, problem)

    def _run_spec(self, position: RunPosition | None) -> RunSpec:
        return msgspec.structs.replace(
            self._spec,
            run_id=self._plan.run_id,
            attempt=self._plan.attempt,
            nonce=self._plan.nonce,
            cause=self._plan.cause,
            base=position,
            must_be_new=False,
        )


def job(
    project: str | None = None,
    *,
    entity: str | None = None,
    name: str | None = None,
    id: str | None = None,
    config: Mapping[str, Any] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    save_every: str | int | None = None,
    keep_last: int = 2,
    strategy: Strategy = "auto",
    seed: int = 0,
    group: str | None = None,
    job_type: str | None = None,
    tags: tuple[str, ...] | list[str] | None = None,
    notes: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
) -> Job:
    """A job on this rank; all ranks make it with the same arguments and enter it with `with`.

    `checkpoint_dir` is the job's identity: starting again with the same one continues the same run from its newest checkpoint.
    Without one, nothing is saved and a restart is a new run. `save_every` is a number of steps ("50 steps"); a
    checkpoint is also made at the end of the loop and on a preemption notice. `keep_last` committed ones stay.

    `strategy`: `rank0` is one run with the ranks' means, `per_rank` a run a rank in one group, `auto` is rank0 with several
    ranks. `seed` seeds Python, NumPy and torch on every rank (differently) and orders the data. The rest as in `init`.

    Raises UsageError for arguments that cannot be right; nothing is started or written before `with`.
    """
    if strategy not in get_args(Strategy):
        raise UsageError(f"strategy={strategy!r} is not known; choose one of: {', '.join(get_args(Strategy))}")
    if save_every is not None and checkpoint_dir is None:
        raise UsageError(f"save_every={save_every!r} needs checkpoint_dir=...: there is nowhere to save to")
    arguments = {
        "project": project,
        "entity": entity,
        "run_id": id,
        "run_name": name,
        "run_group": group,
        "run_job_type": job_type,
        "run_tags": tags,
        "run_notes": notes,
        "mode": mode,
    }
    settings = resolve(None, {key: value for key, value in arguments.items() if value is not None})
    return Job(
        make_spec(settings, config=config),
        run_id=settings.run_id,
        checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir).absolute(),
        save_every=SaveEvery.parse(save_every),
        keep_last=keep_last,
        strategy=strategy,
        seed=seed,
    )


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of the contract that fits how a job was left."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else 0 if code is None else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, Error) else EXIT_RETRYABLE


def seed_everything(seed: int, rank: int) -> None:
    """Seeds Python's, NumPy's (when loaded) and torch's generators from (seed, rank): different on each rank, so that dropout
    is; DDP makes the ranks' initial weights alike by broadcasting rank 0's.
    """
    value = mix64(seed, rank)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)
    import torch

    torch.manual_seed(value >> 1)
