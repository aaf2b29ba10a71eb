"""`Job`: the handle of a job on one rank."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import msgspec

from wbdist.checkpoint.best import Goal
from wbdist.checkpoint.checkpointer import STATE_TIMEOUT, Checkpointer
from wbdist.checkpoint.copying import Elsewhere
from wbdist.checkpoint.history import share
from wbdist.checkpoint.manifest import Manifest
from wbdist.checkpoint.retention import Keep
from wbdist.core.position import RunPosition
from wbdist.distributed import bootstrap, coordination, strategies
from wbdist.distributed.identity import detect
from wbdist.distributed.lateness import LatePolicy
from wbdist.distributed.own_runs import first_spec, per_rank_id
from wbdist.distributed.same_arguments import check_same
from wbdist.distributed.trials import as_shared_trial
from wbdist.errors import EXIT_FAILED_FOR_GOOD, EXIT_PREEMPTED, EnvironmentFault, Error, FencedError, ShutdownError, UsageError
from wbdist.job import one_open, slots
from wbdist.job.accumulation import Group
from wbdist.job.best import BestWatch
from wbdist.job.ending import Fenced, Preempted, exit_code_of, leave_verdict
from wbdist.job.fence import SERVER, FenceWatch
from wbdist.job.phases import Phases, ask_when_submitted
from wbdist.job.plan import Plan, agree_on_plan, decide, position_of, seed_everything, without_directory
from wbdist.job.same_data import SameData
from wbdist.job.saving import COPY_TIMEOUT, PEER_TIMEOUT, Saves
from wbdist.job.slots import Slot
from wbdist.job.stopping import Stopping, reason_of, timed
from wbdist.job.telling import PREEMPTION, going_on, in_total
from wbdist.launch import intent
from wbdist.preemption import sources
from wbdist.preemption.budget import SaveCosts, lead
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice
from wbdist.run import process_end
from wbdist.run.handle import Run
from wbdist.run.lifecycle import RunSpec
from wbdist.run.shipper.client import Standing

if TYPE_CHECKING:
    from torch import nn

    from wbdist.hooks.loader import ResumableLoader
    from wbdist.hooks.lookahead import LookAhead

log = logging.getLogger("wbdist.job")

COLLECTIVE_TIMEOUT = 1800.0
"""Seconds one collective of the training script may take, torch's own default: one rank may evaluate while others wait."""
_END = object()
_OF_OPEN_JOB = frozenset({"_hub", "_identity", "_peers", "_phases", "_plan", "_runs", "_saves", "_step", "_stopping"})
"""What a Job has once it is entered."""
_LEDGER_REDUCE = {"_samples": "sum53", "epoch": "first", "_consumed": "first", "_batch": "first", "_data": "first"}
"""Fingerprints of the ranks' shares add up (modulo 2**53) to the one of the step; the rest is alike on all ranks."""


class Job:
    """Handle of a job on one rank; make it with `job()` and use it as a context manager on the main thread of every rank."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        run_id: str | None,
        checkpoint_dir: Path | None,
        copies: Elsewhere | None,
        save_every: str | int | None,
        save_best: Goal | None = None,
        keep: Keep,
        strategy: strategies.Strategy,
        late: LatePolicy | None = None,
        seed: int,
    ) -> None:
        """Use `job()`. `spec` is the run's; its id counts only when `run_id` asked for it."""
        self._spec = spec
        self._id = run_id
        self._directory = checkpoint_dir
        self._copies = copies
        self._save_every = save_every
        self._save_best = save_best
        self._keep = keep
        self._strategy = strategy
        self._late = late
        self._seed = seed
        self._chosen: Manifest | None = None
        self._in_steps = False
        self._open_step: ResumableLoader | None = None
        """The loader of a step whose body was entered and which is not counted yet."""
        self._step_row: dict[str, Any] = {}
        """What the row that closes the step has beside the ledger."""
        self._step_reduce: Mapping[str, str] = _LEDGER_REDUCE
        self._own_group = False
        self._requests = 0
        self._loops = 0
        self._unwrapped: nn.Module | None = None
        """What `ddp` gave back as it was."""
        self._left = False
        self._stack = ExitStack()

    if not TYPE_CHECKING:  # attributes that there are not stay errors there

        def __getattr__(self, name: str) -> Any:
            """Asked for what opening the job sets, which is not there before."""
            if name in _OF_OPEN_JOB:
                raise UsageError(
                    "this job is not open: its methods and properties work on what entering it makes; "
                    "write `with wbdist.job(...) as job:` and use it inside"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        are watched. Raises JobAlreadyRunningError, CheckpointError, PeerLostError, UsageError (a job is open in this
        process, this one has ended, or ranks were given other arguments than rank 0); nothing is left open then.
        """
        bootstrap.check_main_guard()
        if self._left:
            raise UsageError("this job has ended; to go on, make another with wbdist.job(...) and enter that")
        directory = None if self._directory is None else str(self._directory)
        one_open.take(f"project={self._spec.project!r}, checkpoint_dir={directory!r}")
        self._stack.callback(one_open.release)
        try:
            process_end.chain_excepthook()
            self._phases = Phases.of_process()
            self._open()
        except BaseException as error:
            leave_verdict(_rank_for_verdict(), error)
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        self._step = 0
        self._identity = detect()
        self._peers = coordination.connect(self._identity, one_open.incarnation(), timeout=PEER_TIMEOUT)
        self._stack.callback(self._peers.close)
        deciding = {
            "checkpoint_dir": "None" if self._directory is None else "...",
            "checkpoint_copy": "None" if self._copies is None else "...",
            "save_every": repr(self._save_every),
            "save_best": str(self._save_best),
        }
        mode = self._spec.settings.mode
        check_same(self._peers, "job/same", self._identity, PEER_TIMEOUT, strategy=self._strategy, mode=mode, others=deciding)
        self._spec = as_shared_trial(self._peers, "job/trial", self._spec, PEER_TIMEOUT)
        self._plan = agree_on_plan(self._peers, self._decide, PEER_TIMEOUT if self._copies is None else COPY_TIMEOUT)
        # All ranks are here (they agreed on the plan), so forming takes no time; what counts is how long a collective may last.
        self._own_group = coordination.init_process_group(
            self._identity, incarnation=self._plan.nonce, timeout=COLLECTIVE_TIMEOUT
        )
        seed_everything(self._seed, self.rank)

        costs = SaveCosts()
        checkpoints = best = position = None
        if self._directory is not None:
            checkpoints = self._open_checkpoints(self._directory)
            with self._phases.during("restore"):
                self._chosen = checkpoints.choose(STATE_TIMEOUT)
            if self._save_best is not None:
                known = None if self._chosen is None else self._chosen.best
                best = BestWatch(self._save_best, self._peers, known)
            slot = self._take_slot(self._directory)
            position = position_of(self._chosen, self._run_id(slot.number), slot.number, slot.parked)

        # Signals are watched before the run is announced: whoever sees the run may preempt the job.
        for_host = self._identity.local_rank == 0
        self._hub = NoticeHub(sources.choose(self._spec.settings.notices, for_host=for_host, lead=lambda: lead(costs)))
        self._hub.start()
        self._stack.callback(self._hub.close)
        self._stopping = Stopping(self._peers, self._hub)
        self._stack.callback(self._stopping.close)
        self._runs = strategies.open_runs(self._strategy, self._identity, self._peers, self._run_spec(position), self._late)
        self._saves = Saves(checkpoints, self._runs, self._phases, costs, best, rank=self.rank)
        if self.rank == 0 or self._strategy == "per_rank":
            self._phases.record(self.run.keep_phase, lambda: self._step)
        if self.rank == 0:
            ask_when_submitted(self._phases, ask=self._spec.settings.notices != sources.OFF)
        if self.rank == 0 and self.attempt > 1:
            self._runs.run.settings.say(going_on(self.attempt, self._plan.cause, self._chosen))
        if self.rank == 0 and self._copies is not None and self._directory is not None:
            shipping = self._saves.copy_to(
                self._copies,
                self._directory,
                run_id=self._plan.run_id,
                attempt=self.attempt,
                keep=self._keep,
                chosen=self._chosen,
            )
            self._stack.callback(shipping.close)
            self._stack.callback(FenceWatch(lambda: Standing(shipping.fenced()), self._hub.tell).close)
        if self._runs.run.settings.mode == "online":
            self._stack.callback(FenceWatch(self._runs.standing, self._hub.tell).close)
        intent.write_durable(_rank_for_verdict())

    def _open_checkpoints(self, directory: Path) -> Checkpointer:
        return Checkpointer(
            directory,
            self._peers,
            attempt=self.attempt,
            keep_last=self._keep.last,
            keep_every=self._keep.every,
            keep_best=self._keep.best,
            save_every=self._save_every,
            seed=self._seed,
            config=self._spec.config,
            config_changes=self._spec.settings.config_changes,
            environment_changes=self._spec.settings.environment_changes,
        )

    def _take_slot(self, directory: Path) -> Slot:
        if self._strategy != "per_rank":
            return Slot(self.rank, {})
        place = f"{self._spec.settings.host or socket.gethostname()}/{self._identity.local_rank}"
        slot = slots.take(self._peers, directory, place, self._chosen, PEER_TIMEOUT, trial=bool(self._spec.sweep))
        self._identity = msgspec.structs.replace(self._identity, slot=slot.number)
        return slot

    def _decide(self) -> Plan:
        with self._phases.during("startup" if self._copies is None else "restore"):
            if self._directory is None:
                first = first_spec(self._spec) if self._strategy == "per_rank" else self._spec
                return without_directory(self._spec, first, restarted=self._identity.restart > 0)
            return decide(self._spec, self._id, self._directory, self._copies, self._stack)

    # The parts a training script uses -------------------------------------------------------------------

    def ddp(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """All ranks, in step, before `track`: the model wrapped in DistributedDataParallel; with one rank, the model itself.

        `kwargs` go to DistributedDataParallel. It broadcasts rank 0's parameters, so all ranks start alike. Buckets are laid
        out at once (`hooks.buckets`), so that a step sums gradients in one order, whether it is the first of an attempt or not.
        With `static_graph=True` or sparse gradients that cannot be: with three ranks or more, last bits may then differ.
        """
        from torch import nn

        if not isinstance(model, nn.Module):
            raise UsageError(f"job.ddp() wraps a torch.nn.Module; got {model!r}, a {type(model).__name__}")
        if self.world_size == 1:
            self._unwrapped = model
            return model
        from torch.nn.parallel import DistributedDataParallel

        from wbdist.hooks.buckets import settle

        wrapped = DistributedDataParallel(model, **kwargs)
        settle(wrapped)
        return wrapped

    def watch_ddp(self, model: nn.Module, *, hook: Any = None, state: Any = None, detail_every: int = 50) -> None:
        """All ranks, once, before the first backward pass: what reducing this model's gradients costs and brings goes into the
        row of each step as `ddp/...` (see hooks/ddp.py), and the gradients stay what they are, bit for bit. A rank that the
        others keep waiting for is named, in the rows and on the terminal (see hooks/stragglers.py).

        `hook` and `state` are your own communication hook, as for DDP's `register_comm_hook`, which works afterwards, too.
        Buckets, norms and non-finite elements are looked at every `detail_every` backward passes, 0 for never. With one rank
        `ddp()` gives a plain model: nothing is done then. Raises UsageError for a model that is none of DDP's or has a hook.
        """
        self._check_open("job.watch_ddp()")
        if model is self._unwrapped:
            return
        from wbdist.job.watching import watch

        slow = watch(self, self._peers, model, hook=hook, state=state, detail_every=detail_every)
        self._stack.callback(slow.close)

    def loader(self, dataset: Any, batch_size: int, **kwargs: Any) -> ResumableLoader:
        """All ranks, with the same arguments: batches of this rank's share of `dataset`, shuffled anew each epoch.

        `batch_size` is per rank. The order depends on the job's seed and the epoch alone, and the position counts samples
        consumed by all ranks, so a resumed job continues it with any number of ranks or workers. `kwargs` as for
        ResumableLoader (num_workers, tail, collate_fn, ...).
        """
        from wbdist.hooks.loader import ResumableLoader

        kwargs.setdefault("seed", self._seed)
        return ResumableLoader(dataset, batch_size, rank=self.rank, world_size=self.world_size, **kwargs)

    def track(self, *, per_rank: Mapping[str, Any] | None = None, **stateful: Any) -> None:
        """All ranks, in step, once, before `steps`: these objects are saved with every checkpoint, and restored here and now.

        Anything with state_dict() and load_state_dict(). What each rank holds for itself goes by name into `per_rank`;
        metrics of torchmetrics are such in any case. Blocks while the checkpoint is read. Raises StateMissingError when it
        was made with other names, ConfigError when with another config, CheckpointError when it cannot be read.
        """
        self._check_open("job.track()")

        def settle() -> None:
            if self.world_size > 1:
                from wbdist.hooks.buckets import settle_tracked

                settle_tracked(stateful.values())

        restored_step = self._saves.track(stateful, per_rank or {}, settle=settle)
        if restored_step is not None:
            self._step = restored_step

    @property
    def accumulating(self) -> bool:
        """Inside the loop: whether the gradients of this batch are kept for the next ones, as `accumulate` of `steps` says."""
        return self._saves.group.open

    def steps(self, data: ResumableLoader, *, epochs: int, accumulate: int = 1) -> Iterator[Any]:
        """All ranks, in step: yields this rank's batches until `epochs` epochs are done, over all attempts.

        Between two batches it closes the step's row, saves when due, and agrees with the other ranks whether to go on. On a
        notice it saves and raises Preempted on every rank before the same step. Ends with a checkpoint of the final state. A
        `break` counts the step it leaves as done; it is for all ranks alike, since those that go on would wait in vain for
        the others when they save or stop, for STATE_TIMEOUT seconds. Torch's Join belongs inside a step. Raises UsageError on
        ranks whose loader is known to be another than rank 0's, after the first step at the latest.

        A step is a batch. With `accumulate=4` the optimizer is to be stepped once in four, and at the end of an epoch: when
        `job.accumulating` is False. Saves and stops wait for that, since no checkpoint holds half a gradient.
        """
        from wbdist.hooks.loader import ResumableLoader

        self._check_open("job.steps()")
        if not isinstance(data, ResumableLoader):
            raise UsageError(
                f"job.steps() needs a loader with a position; got {type(data).__name__}. Make it with job.loader(dataset, ...)"
            )
        if self._saves.enabled and not self._saves.tracked:
            raise UsageError(
                "call job.track(model=..., optimizer=..., data=...) before job.steps(): nothing would be saved or restored"
            )
        if self._in_steps:
            raise UsageError("job.steps() is running already; a job has one loop over its steps at a time")
        self._close_step()
        self._saves.check_config()
        group = self._saves.group = Group(accumulate)
        self._loops += 1
        same = SameData(self._peers, self._loops, data.sampler, epochs, accumulate)
        self._phases.enter("train")
        self._in_steps = True
        try:
            batches = data.epochs(epochs, ahead=accumulate)
            self._await_data(batches)
            while True:
                if not same.known:
                    same.check()
                # Before the batch is asked for: the loader's position counts it as soon as it is handed out.
                batches.wait(self._stopping.told)
                if not group.open:
                    self._stop_if_told(batches)
                batch = next(batches, _END)
                if batch is _END:
                    break
                group.take(data.sampler.left)
                self._open_step = data
                yield batch
                self._close_step()
        except Preempted:
            data.abandon()  # torch would wait 5 s for a worker that waits for its data
            raise
        finally:
            # A `break` and an exception in the body look alike from in here (GeneratorExit), so the open step is left
            # open: the next call on the job closes it, and leaving the job by an exception forgets it.
            self._in_steps = False
        self._saves.save(self._step, "end")

    def log(self, data: Mapping[str, Any], *, reduce: str | Mapping[str, str] = "mean", step: int | None = None) -> None:
        """All ranks, any thread: adds to the row of the current step. Durable on this rank's disk when it returns; never
        waits for a peer, a server or the disk's queue.

        `reduce` ("mean", "sum", "min", "max", ... or one per key) says what becomes of the ranks' values under strategy rank0.
        """
        if not self._in_steps:
            self._check_open("job.log()")
            self._close_step()
            self._phases.working()
        elif step is None:
            self._saves.hear(data)
        self._runs.log(data, step=self._step if step is None else step, reduce=reduce)

    def log_at_close(self, data: Mapping[str, Any], reduce: Mapping[str, str]) -> None:
        """As `log`, but part of the row that closes the step that is open: for what comes with each step, and is worth no write
        of its own. Not durable before. A key's `reduce` is always the same."""
        if not self._in_steps or self._open_step is None:
            self.log(data, reduce=reduce)
            return
        self._saves.hear(data)
        if not self._step_reduce.keys() >= reduce.keys():
            self._step_reduce = {**self._step_reduce, **reduce}
        self._step_row.update(data)

    @property
    def notice(self) -> Notice | None:
        """What this rank has been told, None while it is to go on. Any thread, not in step: for work that one rank does alone
        (an evaluation on rank 0 that may be cut short). What all ranks do together asks `should_stop`."""
        return self._stopping.notice

    def should_stop(self) -> bool:
        """All ranks, in the same sequence: asked before each unit of work outside the steps (a batch of an evaluation, a wait
        for data), True on all ranks before the same unit once a notice has come, and from then on.

        Under a microsecond while there is none; then it blocks until all ranks have said where they are, at most 20 s. After
        True, leave what you are doing: the next step, or the end of the job, saves and raises Preempted.
        """
        return not self._stopping.may_go_on()

    def save(self) -> None:
        """All ranks, in step, between steps: saves now and waits until the checkpoint is committed.

        Raises PeerLostError naming ranks that did not call it within PEER_TIMEOUT seconds.
        """
        self._check_open("job.save()")
        if self._in_steps:
            raise UsageError(
                "job.save() was called inside the loop, where a step is half done; use save_every, or call it after the loop"
            )
        self._close_step()
        self._requests += 1
        # Called on some ranks alone, it would be waited for as long as a save may take.
        self._peers.barrier(f"job/save/{self._requests}", PEER_TIMEOUT)
        self._saves.save(self._step, "request", block=True)

    # Step boundaries ------------------------------------------------------------------------------------

    def _await_data(self, batches: LookAhead) -> None:
        """All ranks, in step, before a step that no rank has begun: so that all have its batch when one begins it."""
        if batches.looks_ahead:
            self._stopping.meet("data", ready=batches.wait(self._stopping.told))

    def _stop_if_told(self, batches: LookAhead) -> None:
        self._heed_advice(batches)
        while (begun := self._stopping.begin_unit()) is None:
            self._heed_advice(batches)
        if not begun:
            # Behind a save of this very step nothing was trained: agreeing to stop is all that has passed since.
            self._phases.enter("stop", began_before=self._saves.saved_step == self._step)
            self._stop()

    def _heed_advice(self, batches: LookAhead) -> None:
        """All ranks, in step, before a step that no rank has begun: what advice asks for, heard here or in an evaluation."""
        if not self._stopping.advised:
            return
        self._stopping.advised = False
        if self._stopping.advice_agreed:
            self._saves.save(self._step, "advice")
        self._await_data(batches)  # some rank's wait for it may have been cut short by the advice

    def _stop(self) -> NoReturn:
        """All ranks, in step, at the same boundary: what the notice leaves time for, then Preempted."""
        self._phases.enter("stop")
        notice = self._stopping.check()
        if notice.fenced:
            raise FencedError(notice.reason)
        if not notice.cancelled:
            self._runs.run.mark_preempting()
        saves = self._saves
        plan = self._stopping.agree(saves.costs, saving=saves.under_way(), committed=saves.committed_step, timeout=PEER_TIMEOUT)
        saved: float | None = None
        failure: EnvironmentFault | None = None
        try:
            if plan.act == "save":
                saved = timed(lambda: saves.save(self._step, PREEMPTION, block=True, timeout=plan.timeout(STATE_TIMEOUT)))
            elif plan.act == "finish":
                saves.finish_pending(plan.timeout(STATE_TIMEOUT))
        except EnvironmentFault as error:
            failure = error  # the machine goes all the same, and an earlier checkpoint may stand
        saves.report()
        if self.rank == 0:
            self._runs.run.keep_facts(self._stopping.facts(notice, saved))
        stands = max(plan.committed, saves.committed_step)
        lost = saves.enabled and stands < 0
        if lost and failure is not None:
            raise failure
        reason = reason_of(notice)
        problem = plan.because() if failure is None else str(failure)
        if problem and saves.enabled:
            what = f"the checkpoint of step {stands} stands" if stands >= 0 else "there is no checkpoint to go on from"
            reason += f"; nothing was saved now ({problem}), {what}"
            if self.rank == 0:
                self._runs.run.settings.say(reason, warning=True)
        if (
            notice.cancelled and notice.source == SERVER
        ):  # no launcher has heard of it: the code must tell it not to start again
            raise Preempted(reason, EXIT_FAILED_FOR_GOOD)
        raise Preempted(reason, 143 if lost or plan.cancelled else EXIT_PREEMPTED)

    def _close_step(self) -> None:
        """Counts the step that is open, if any; all ranks, in step."""
        data, self._open_step = self._open_step, None
        if data is None:
            return
        more, self._step_row = self._step_row, {}
        self._runs.log({**data.ledger(), **more}, step=self._step, reduce=self._step_reduce)
        self._runs.commit_row()
        self._step += 1
        self._saves.after_step(self._step)

    # Leaving --------------------------------------------------------------------------------------------

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """All ranks. Without an error: in step; the last save is waited for, the run is finished, its rows acknowledged or
        left to the shipper. With one: within seconds, without waiting for peers that may be gone. A job that `should_stop`
        told to stop leaves as one that is preempted.

        Raises Fenced when it is that another job has taken the run over.
        """
        self._phases.enter("stop")
        try:
            if error is None and self._stopping.asked:
                self._leave_told()
            elif error is None:
                self._leave_finished()
            elif isinstance(error, Preempted):
                self._leave_preempted(error)
            else:
                self._leave_failed(error)
        except BaseException as problem:
            leave_verdict(_rank_for_verdict(), problem)
            if isinstance(problem, FencedError):
                self._leave_failed(problem)
                self._leave_fenced(problem)
            raise
        else:
            leave_verdict(_rank_for_verdict(), error)
            if isinstance(error, FencedError):
                self._leave_fenced(error)
        finally:
            self._left = True
            self._stack.close()

    def _check_open(self, what: str) -> None:
        if self._left:
            raise ShutdownError(f"{what} came after the `with` block of its job had ended; move it inside")

    def _leave_told(self) -> NoReturn:
        self._close_step()
        try:
            self._stop()
        except Preempted as error:
            self._leave_preempted(error)
            raise

    def _leave_finished(self) -> None:
        self._close_step()
        if self._saves.tracked:
            self._saves.save(self._step, "end")
        self._saves.close()
        self._saves.report()
        self._saves.settle_copies(through_run=True)
        self._finish(0)
        if self.rank == 0:
            for line in in_total(self._runs.run, self.attempt):
                self._runs.run.settings.say(line)
        self._leave_group()
        self._saves.settle_copies()

    def _leave_preempted(self, error: Preempted) -> None:
        left = self._stopping.left
        if left is None or self._saves.settled:
            self._saves.close()
        if left is not None:
            self._runs.run.hurry(left)
        self._saves.report()
        self._saves.settle_copies(COPY_TIMEOUT if left is None else max(0.0, left), through_run=True)
        self._finish(exit_code_of(error))
        self._leave_group()
        self._saves.settle_copies(COPY_TIMEOUT if self._stopping.left is None else max(0.0, self._stopping.left))
        self._stopping.let_go()

    def _finish(self, exit_code: int) -> None:
        self._phases.end()
        self._runs.finish(exit_code)

    def _leave_group(self) -> None:
        """Only where all ranks leave well: taking a group apart may wait for peers, and after a failure they are gone."""
        if self._own_group:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _leave_failed(self, error: BaseException) -> None:
        self._open_step = None
        more, self._step_row = self._step_row, {}
        if more:
            with suppress(Error):  # a disk that is full may be why the job fails
                self._runs.log(more, step=self._step, reduce=self._step_reduce)
        self._stopping.close(failed=True)  # first: peers that were told to stop learn at once that there is no common stop
        self._saves.abandon(error)
        self._finish(exit_code_of(error))

    def _leave_fenced(self, error: FencedError) -> NoReturn:
        if self.rank == 0 and not intent.supervised():
            self._runs.run.settings.say(str(error), warning=True)
        raise Fenced(str(error)) from error

    def _run_id(self, slot: int) -> str:
        run_id = self._plan.run_id
        return per_rank_id(run_id, slot, in_sweep=bool(self._spec.sweep)) if self._strategy == "per_rank" else run_id

    def _run_spec(self, position: RunPosition | None) -> RunSpec:
        return msgspec.structs.replace(
            self._spec,
            run_id=self._plan.run_id,
            attempt=self._plan.attempt,
            nonce=self._plan.nonce,
            cause=self._plan.cause,
            base=position,
            earlier=share(self._chosen, self.rank, self.world_size, one_run=self._strategy != "per_rank"),
            must_be_new=False,
        )


def _rank_for_verdict() -> int:
    """The supervisor's number for this process, known even when finding out the identity is what failed."""
    return int(os.environ.get("RANK", "0"))
