"""Where a pool's workers log: into the run of the process that made the pool, or into runs of their own in its group.

| runs       | a worker's `wbdist.run` is                        | rows                                                 |
|------------|---------------------------------------------------|------------------------------------------------------|
| `"parent"` | a part of the parent's run, labelled `w<worker>`  | steps of one counter; columns pool/task, pool/worker |
| `"worker"` | `<parent>-w<worker>`, a run for each process      | the run's own                                        |
| `"task"`   | `<parent>-t<task>`, a run for each call           | the run's own                                        |
| `"none"`   | none: tasks may open their own with `init`        |                                                      |
"""

from __future__ import annotations

import itertools
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from wbdist.distributed.pool_steps import SharedSteps, SteppedRows
from wbdist.errors import UsageError
from wbdist.run import lifecycle, trial
from wbdist.run.handle import Run
from wbdist.run.init import SETTING_OF, make_spec
from wbdist.run.lifecycle import RunSpec
from wbdist.run.parts import Part, open_part, part_of
from wbdist.settings import resolve

Kind = Literal["parent", "worker", "task", "none"]
KINDS = ("parent", "worker", "task", "none")

_NEW: dict[str, Any] = {
    "attempt": 1,
    "nonce": "",
    "base": None,
    "base_run": "",
    "at_step": None,
    "fresh": (),
    "earlier": (),
    "resume": "",
    "auto_resume": False,
    "branch": None,
    "branch_point": None,
}
"""What a run that goes on with nothing has in its spec."""


class Plan(msgspec.Struct, frozen=True):
    """What a worker opens. Can be pickled."""

    kind: Kind
    part: Part | None = None
    spec: RunSpec | None = None
    """Of runs of their own."""


_parents: weakref.WeakKeyDictionary[Run, ParentRun] = weakref.WeakKeyDictionary()
_adopted: weakref.WeakKeyDictionary[Run, SteppedRows] = weakref.WeakKeyDictionary()
"""Parts that workers have open: their own pools go on with the same counter."""
_lock = threading.Lock()


class ParentRun:
    """What this process keeps for a run that pools log to, however many there are, one after the other or at once."""

    def __init__(self, run: Run) -> None:
        self.workers = itertools.count()
        self.tasks = itertools.count()
        self.rows: SteppedRows | None = _adopted.get(run)


class Runs:
    """A pool's side: numbers its workers and tasks, and says what they open."""

    def __init__(self, kind: str | None, run: Run | None, init: Mapping[str, Any] | None) -> None:
        """`kind` None: "parent" where there is a run, else "none". Raises UsageError."""
        run = run if run is not None else lifecycle.current_run()
        if kind is None:
            kind = "task" if init is not None else "none" if run is None else "parent"
        if kind not in KINDS:
            raise UsageError(f"runs={kind!r} is not known; choose one of: {', '.join(KINDS)}")
        if init is not None and kind not in {"worker", "task"}:
            raise UsageError(f'init= says how runs of the workers\' own are opened; with runs="{kind}" there are none')
        self.steps: SharedSteps | None = None
        self.finish_timeout = 0.0
        """Seconds that a worker may need to finish its runs."""
        self.workers: Iterator[int] = itertools.count()
        self.tasks: Iterator[int] = itertools.count()
        if kind == "parent":
            if run is None:
                raise UsageError('runs="parent" needs an open run: call wbdist.init() before, or pass run=')
            self.plan = Plan("parent", part=part_of(run))
            self._number(run)
            self.finish_timeout = run.settings.finish_timeout
        elif kind == "none":
            self.plan = Plan("none")
        else:
            spec = _own(kind, run, init)
            self.plan = Plan("task" if kind == "task" else "worker", spec=spec)
            self.finish_timeout = spec.settings.finish_timeout
            if run is not None and init is None:
                self._number(run)

    def _number(self, run: Run) -> None:
        """Workers and tasks are numbered across all pools of a run, whose rows share one counter of steps."""
        with _lock:
            parent = _parents.get(run)
            if parent is None:
                parent = _parents[run] = ParentRun(run)
            if self.plan.kind == "parent":
                parent.rows = parent.rows or SteppedRows(run, SharedSteps.create(run.step))
                self.steps = parent.rows.steps
        self.workers, self.tasks = parent.workers, parent.tasks


def _own(kind: str, run: Run | None, init: Mapping[str, Any] | None) -> RunSpec:
    if init is not None:
        given = {SETTING_OF.get(name, name): value for name, value in init.items() if name not in {"config", "settings"}}
        settings = resolve(init.get("settings"), given)
        spec = trial.as_trial(make_spec(settings, config=init.get("config")), trial.read(settings))
        if spec.resume or spec.branch is not None:
            raise UsageError("init= of a pool cannot resume or fork: each of its runs is new")
    elif run is not None:
        spec = msgspec.structs.replace(
            run._spec,  # noqa: SLF001
            config=run.config.as_dict(),
            name=run.name,
            writer="rank0",
            role="run",
            rank=0,
            job_type=None,
            url=None,
            metrics=(),
            cause="start",
            **_NEW,
        )
    else:
        raise UsageError(f'runs="{kind}" needs an open run to group with, or init={{"project": ...}}')
    facts = {"group": spec.group or spec.run_id, "job_type": spec.job_type or kind}
    return msgspec.structs.replace(spec, **facts, sweep="", sample="process")  # of a trial's runs the sweep counts one


class WorkerRuns:
    """A worker's side."""

    def __init__(self, plan: Plan, worker: int, steps: SharedSteps | None) -> None:
        self._plan = plan
        self._worker = worker
        self._steps = steps
        self._rows: SteppedRows | None = None
        self._run: Run | None = None

    def begin(self) -> None:
        """First thing in the worker."""
        if self._plan.kind == "worker":
            self._open_own(f"w{self._worker}", {"worker": self._worker})
        elif self._plan.kind == "parent":
            self._open_part()

    def initialized(self) -> None:
        """Behind the initializer: a run that it opened is this worker's from here on."""
        run = lifecycle.current_run()
        if self._plan.kind in {"parent", "worker"} and run is not self._run:
            self._run, self._rows = run, None

    def begin_task(self, task: int) -> None:
        if self._plan.kind == "task":
            self._open_own(f"t{task}", {"task": task, "worker": self._worker})
        elif self._rows is not None:
            assert self._run is not None
            # Behind a task that named steps, this one's may begin again: it writes a part of its own. One that called `init` or
            # `finish` has ended the part.
            if self._rows.explicit or self._run.finished:
                self._run.finish(0)
                self._open_part()
            self._rows.columns = {"pool/task": task, "pool/worker": self._worker}

    def end_task(self, error: BaseException | None) -> None:
        """What the task left in the open row is logged; a run of its own ends, and so does one that it opened and left open."""
        run = self._run
        left = lifecycle.current_run()
        if left is not None and left is not run and self._plan.kind != "none":
            left.finish(0 if error is None else 1)
            if run is not None and not run.finished:
                lifecycle.set_current(run)
        if run is None or run.finished:
            return
        if self._plan.kind == "task":
            run.finish(0 if error is None else 1)
        else:
            run.commit_row()
            if self._rows is not None:
                self._rows.columns = {"pool/worker": self._worker}

    def end(self, code: int) -> None:
        """Last thing in a worker that leaves by itself."""
        if self._run is not None and not self._run.finished:
            self._run.finish(code)

    def _open_own(self, suffix: str, facts: dict[str, Any]) -> None:
        spec = self._plan.spec
        assert spec is not None
        run_id = f"{spec.run_id}-{suffix}"
        name = f"{spec.name}-{suffix}" if spec.name else None
        config = {**spec.config, "pool": facts}
        spec = msgspec.structs.replace(spec, run_id=run_id, name=name, config=config, id_is_given=True)
        with _not_terminated():
            self._take(lifecycle.open_run(spec))

    def _open_part(self) -> None:
        assert self._plan.part is not None
        assert self._steps is not None
        label = f"w{self._worker}"
        above = self._plan.part.spec.settings.x_label
        if above:
            label = f"{above}.{label}"
        with _not_terminated():
            run = open_part(self._plan.part, f"{label}-{lifecycle.new_run_id()}", label)
        self._rows = _adopted[run] = SteppedRows(run, self._steps, {"pool/worker": self._worker})
        self._take(run)

    def _take(self, run: Run) -> None:
        self._run = run
        lifecycle.set_current(run)


@contextmanager
def _not_terminated() -> Iterator[None]:
    """A SIGTERM meanwhile has its effect afterwards: a pool that ends early leaves no half a journal. A handler, not a mask,
    which the shipper would inherit."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)
