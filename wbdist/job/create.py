"""`job()`: arguments checked, nothing started."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from wbdist.checkpoint.best import Goal
from wbdist.checkpoint.changes import Allowed
from wbdist.checkpoint.copies import Copies
from wbdist.checkpoint.copying import Elsewhere, OnStore
from wbdist.checkpoint.policy import SavePolicy
from wbdist.checkpoint.retention import Keep
from wbdist.distributed.lateness import LatePolicy
from wbdist.distributed.strategies import Strategy
from wbdist.errors import UsageError
from wbdist.job.handle import Job
from wbdist.job.run_copies import RunCopies
from wbdist.preemption import sources
from wbdist.run.init import make_spec
from wbdist.run.lifecycle import RunSpec
from wbdist.settings import Settings, resolve


def steps_between(value: str | int | None, what: str) -> int | None:
    """`50` or `"50 steps"` as a number of steps, or None. Raises UsageError for anything else."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*(steps?)?\s*", str(value))
    if isinstance(value, bool) or match is None or int(match[1]) == 0:
        raise UsageError(
            f'{what}={value!r} is not understood; give a positive number of steps such as 50 or "50 steps", or None'
        )
    return int(match[1])


def job(
    project: str | None = None,
    *,
    entity: str | None = None,
    name: str | None = None,
    id: str | None = None,
    config: Mapping[str, Any] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_copy: str | None = None,
    save_every: str | int | None = None,
    save_best: str | None = None,
    keep_last: int = 2,
    keep_every: str | int | None = None,
    keep_best: str | None = None,
    strategy: Strategy = "auto",
    late: LatePolicy | None = None,
    seed: int = 0,
    config_changes: str | Iterable[str] | None = None,
    environment_changes: str | Iterable[str] | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: tuple[str, ...] | list[str] | None = None,
    notes: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
    notices: str | None = None,
) -> Job:
    """A job on this rank; all ranks make it with the same arguments and enter it with `with`.

    `checkpoint_dir` is the job's identity: starting again with the same one continues the same run from its newest checkpoint.
    Without one, nothing is saved and a restart is a new run; with an `id`, that run's next attempt from step 0, by a launcher's
    restart or a sweep's, and refused by hand. `save_every` is a number of steps ("50 steps"), a time
    ("10 minutes"), or "auto": the interval that loses the least, from what saves cost and how often this job has failed. With
    `save_best` also each step is saved in which that metric is better than ever; all ranks log it, in the same steps within the
    loop ("loss": the lowest mean of theirs, "max:accuracy": the highest). A checkpoint is also made at the end of the loop and
    on a preemption notice. The newest `keep_last` committed ones stay, those of every `keep_every` steps, and the best by
    `keep_best`, a metric as for `save_best`, and the same unless it is said.

    `checkpoint_copy` is an object store's address ("s3://bucket/jobs/digits", extra `s3`): committed checkpoints are copied
    there in the background, and a job whose disk is gone, or that starts on another machine, continues from there. "run" keeps
    them with the run on its server; then give `id` (or WANDB_RUN_ID), by which an empty directory finds its run.

    `strategy`: `rank0` is one run with the ranks' means, `per_rank` a run a rank in one group, `shared` one run that every rank
    writes rows of its own into, `rank_zero_only` rank 0's run (docs/strategies.md); `late` says when a step's row no longer
    waits for slow ranks; `auto` is rank0 with several ranks. `seed` seeds Python, NumPy and torch on every rank (differently)
    and orders the data. `config_changes` names the keys of `config` (or "allow": any) that may differ from those of the
    checkpoint, which else is an error; `environment_changes` the same for torch's switches (docs/checkpoints.md). `notices`:
    besides signals, what may say that the job must stop, as the setting of that name ("auto", "off", "aws,file=/shared/stop").
    The rest as in `init`.

    Raises UsageError for arguments that cannot be right; nothing is started or written before `with`.
    """
    if strategy not in get_args(Strategy):
        raise UsageError(f"strategy={strategy!r} is not known; choose one of: {', '.join(get_args(Strategy))}")
    SavePolicy.parse(save_every)
    if save_every is not None and checkpoint_dir is None:
        raise UsageError(f"save_every={save_every!r} needs checkpoint_dir=...: there is nowhere to save to")
    if checkpoint_copy is not None and checkpoint_dir is None:
        raise UsageError(f"checkpoint_copy={checkpoint_copy!r} needs checkpoint_dir=...: a local directory to save to first")
    if checkpoint_dir is not None and "://" in str(checkpoint_dir):
        url = str(checkpoint_dir)
        raise UsageError(f"checkpoint_dir={url!r} is not a directory; give a local one, and checkpoint_copy={url!r}")
    if save_best is not None and checkpoint_dir is None:
        raise UsageError(f"save_best={save_best!r} needs checkpoint_dir=...: there is nowhere to save to")
    goal = None if save_best is None else Goal.parse(save_best, "save_best")
    keep = Keep(keep_last, steps_between(keep_every, "keep_every"), save_best if keep_best is None else keep_best)
    keep.check()
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
        "notices": notices,
        "config_changes": _named(config_changes),
        "environment_changes": _named(environment_changes),
    }
    settings = resolve(None, {key: value for key, value in arguments.items() if value is not None}, as_trial=True)
    sources.parse(settings.notices)
    Allowed.parse(settings.config_changes, "config_changes")
    Allowed.parse(settings.environment_changes, "environment_changes")
    spec = make_spec(settings, config=config)
    return Job(
        spec,
        run_id=settings.run_id,
        checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir).absolute(),
        copies=_elsewhere(checkpoint_copy, spec, settings, strategy),
        save_every=save_every,
        save_best=goal,
        keep=keep,
        strategy=strategy,
        late=late,
        seed=seed,
    )


def _named(changes: str | Iterable[str] | None) -> str | None:
    return changes if changes is None or isinstance(changes, str) else ",".join(changes)


def _elsewhere(copy: str | None, spec: RunSpec, settings: Settings, strategy: Strategy) -> Elsewhere | None:
    if copy is None:
        return None
    if copy != "run":
        return OnStore(Copies(copy))
    if settings.mode != "online":
        raise UsageError(f"checkpoint_copy='run' means the run's server, and the mode is {settings.mode!r}; use online")
    return RunCopies(spec, settings.run_id, per_rank=strategy == "per_rank")
