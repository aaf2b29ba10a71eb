"""`init`: one line that opens a run, with W&B's arguments; and the module-level run that goes with it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wbdist.core.wandb_settings import WithoutEffect
from wbdist.errors import UsageError
from wbdist.protocol import names
from wbdist.protocol.attempts import SHARED
from wbdist.run import config_files, lifecycle, machine, trial
from wbdist.run.choosing import choose
from wbdist.run.config import checked
from wbdist.run.handle import Run
from wbdist.run.lifecycle import RunSpec
from wbdist.run.main_guard import check_child
from wbdist.settings import Settings, resolve

if TYPE_CHECKING:
    from wbdist.run.metrics import Metric

NOT_BUILT = {
    "tensorboard": "reading TensorBoard logs",
    "sync_tensorboard": "reading TensorBoard logs",
    "monitor_gym": "recording gym videos",
}
"""W&B's arguments that this version refuses; silently doing nothing would lose what was asked for."""

SETTING_OF = {
    "dir": "root_dir",
    "id": "run_id",
    "name": "run_name",
    "notes": "run_notes",
    "tags": "run_tags",
    "group": "run_group",
    "job_type": "run_job_type",
}
"""Arguments of `init` that are not called as the setting they are."""

_warned: set[str] = set()


def init(  # noqa: PLR0917  (W&B's order, but for `project` first, as its documents have it)
    project: str | None = None,
    entity: str | None = None,
    dir: str | os.PathLike[str] | None = None,
    id: str | None = None,
    name: str | None = None,
    notes: str | None = None,
    tags: Sequence[str] | str | None = None,
    config: Mapping[str, Any] | Any | None = None,
    config_exclude_keys: Iterable[str] | None = None,
    config_include_keys: Iterable[str] | None = None,
    allow_val_change: bool | None = None,
    group: str | None = None,
    job_type: str | None = None,
    mode: str | None = None,
    force: bool | None = None,
    reinit: str | bool | None = None,
    resume: str | bool | None = None,
    resume_from: str | None = None,
    fork_from: str | None = None,
    save_code: bool | None = None,
    tensorboard: bool | None = None,
    sync_tensorboard: bool | None = None,
    monitor_gym: bool | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
    anonymous: str | None = None,
) -> Run:
    """Opens a run and makes it the global one (`wbdist.run`), unless `reinit="create_new"`. Any process, not in step.

    While a run is open: `finish_previous` (the default) finishes every open run of this process first, `return_previous`
    (the default in notebooks) returns the newest open run and ignores all other arguments, `create_new` adds one and leaves
    the global run alone.

    Waits as `lifecycle.open_run` says. Raises UsageError for what cannot be right, AuthenticationError, CommError when the
    server refuses the run, JournalError when the disk does. MainGuardError in a spawned child that is only loading its parent's
    script: it would open a run a child.
    """
    check_child("wbdist.init()")
    if isinstance(reinit, bool) and "reinit" not in _warned:
        _warned.add("reinit")
        word = "finish_previous" if reinit else "return_previous"
        warnings.warn(f'reinit={reinit} is W&B\'s old form; write reinit="{word}"', DeprecationWarning, stacklevel=2)
    arguments = {
        "project": project,
        "entity": entity,
        "root_dir": dir,
        "run_id": id,
        "run_name": name,
        "run_notes": notes,
        "run_tags": tags,
        "run_group": group,
        "run_job_type": job_type,
        "mode": mode,
        "reinit": reinit,
        "resume": resume,
        "resume_from": resume_from,
        "fork_from": fork_from,
        "allow_val_change": allow_val_change,
        "force": force,
        "save_code": save_code,
        "anonymous": anonymous,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    # With an id of its own, a run beside others is none of the sweep's.
    beside = id is not None and reinit == "create_new"
    resolved = resolve(settings, given, as_trial=not beside)
    refuse_what_is_not_built(
        tensorboard=tensorboard,
        sync_tensorboard=sync_tensorboard,
        monitor_gym=monitor_gym,
    )
    if resolved.start_method is not None and "start_method" not in _warned:
        _warned.add("start_method")
        resolved.say(
            "setting start_method is accepted as in W&B and has no effect: there is no service process to start", warning=True
        )
    ignored = {name for name in WithoutEffect.__struct_fields__ if getattr(resolved, name) is not None} - _warned
    if ignored:
        _warned.update(ignored)
        resolved.say(f"accepted as in W&B, without effect here: {', '.join(sorted(ignored))}", warning=True)

    policy = resolved.reinit
    if policy == "default":
        policy = "return_previous" if machine.in_notebook() and not _is_another_trial(resolved) else "finish_previous"
    if policy == "return_previous" and (active := lifecycle.active_runs()):
        newest = active[-1]
        if resolved.resume == "must" and newest.id != resolved.run_id:
            raise UsageError(
                f'resume="must" asks for run {resolved.run_id!r}, and reinit="return_previous" would return {newest.id!r}, '
                'which is open: finish that one first, or give reinit="finish_previous" or "create_new"'
            )
        if set(given) - {"reinit"} or config is not None:
            resolved.say(
                f"run {newest.id} is open and returned; the other arguments of init() are ignored (reinit)", warning=True
            )
        return newest
    _point_at_ranks(resolved)
    spec = make_spec(
        resolved,
        config=config,
        config_exclude_keys=config_exclude_keys,
        config_include_keys=config_include_keys,
    )
    if not beside:
        spec = trial.as_trial(spec, trial.read(resolved))
    if policy == "finish_previous":
        lifecycle.finish_previous()
    if spec.sweep:
        from wbdist.run import anew

        spec = anew.begun(spec, restarted=False)
    run = lifecycle.open_run(spec)
    run.belongs_to_script()
    if policy != "create_new":
        lifecycle.set_current(run)
    return run


def _is_another_trial(settings: Settings) -> bool:
    """Whether an agent that runs its trials in this process, in a notebook, has begun the next one."""
    return settings.sweep_id is not None and any(run.id != settings.run_id for run in lifecycle.active_runs())


def _point_at_ranks(settings: Settings) -> None:
    """One rank, never the first (which may be the only one that a script lets call `init`), says what `init` does on many."""
    if os.environ.get("RANK") != "1" or "ranks" in _warned or settings.run_group or settings.mode in {"shared", "disabled"}:
        return
    _warned.add("ranks")
    settings.say(
        f"wbdist.init() is called on several of {os.environ.get('WORLD_SIZE', 'the')} ranks: each has a run of its own. One "
        "run of all of them is wbdist.init_ranks(...), with these arguments, or wbdist.job(...); runs in one group: group=...",
        warning=True,
    )


def make_spec(
    settings: Settings,
    *,
    config: Mapping[str, Any] | Any | None = None,
    config_exclude_keys: Iterable[str] | None = None,
    config_include_keys: Iterable[str] | None = None,
) -> RunSpec:
    """The spec of attempt 1 of a run, from resolved settings; for others to vary with `msgspec.structs.replace`. Of a sweep's
    trial it knows nothing yet: that is `trial.as_trial`'s, which of several ranks one does for all.

    Raises UsageError for ids, names, tags and config that cannot be used. Reads the git checkout's name when no project is set.
    """
    values = {**checked(config_files.defaults(settings.config_paths)), **(checked(config) if config is not None else {})}
    if config_exclude_keys is not None and config_include_keys is not None:
        raise UsageError("give config_exclude_keys or config_include_keys, not both")
    if config_include_keys is not None:
        wanted = set(config_include_keys)
        values = {key: value for key, value in values.items() if key in wanted}
    if config_exclude_keys is not None:
        unwanted = set(config_exclude_keys)
        values = {key: value for key, value in values.items() if key not in unwanted}
    here = Path.cwd()
    project = (
        names.project(settings.project) if settings.project is not None else machine.default_project(machine.git(here), here)
    )
    goes_on = choose(settings, project)
    shared = settings.mode == "shared"
    if shared and (goes_on.resume or goes_on.branch is not None):
        raise UsageError(
            'mode="shared" cannot be given with resume, fork_from or resume_from: writers just join the run of `id`'
        )
    writer = f"{settings.x_label or settings.host or machine.host()}-{lifecycle.new_run_id()}"
    return RunSpec(
        settings=settings,
        nonce=SHARED if shared else "",
        writer=writer if shared else "rank0",
        run_id=goes_on.run_id,
        resume=goes_on.resume,
        auto_resume=goes_on.auto,
        branch=goes_on.branch,
        id_is_given=goes_on.id_is_given,
        project=project,
        entity=names.entity(settings.entity or ""),
        name=settings.run_name,
        notes=settings.run_notes,
        tags=names.tags(settings.run_tags) if settings.run_tags is not None else None,
        group=settings.run_group,
        job_type=settings.run_job_type,
        config=values,
        allow_val_change=settings.allow_val_change or machine.in_notebook(),
        must_be_new=goes_on.id_is_given and not shared and not goes_on.resume and (goes_on.branch is None or goes_on.is_fork),
        force=settings.force,
        capture_console=settings.console != "off",
    )


def refuse_what_is_not_built(**given: object) -> None:
    for argument, value in given.items():
        if value not in (None, False, ""):
            raise UsageError(f"{argument}={value!r}: {NOT_BUILT[argument]} is not built yet; leave it out")


# The module-level run ---------------------------------------------------------------------------------


def global_run(what: str) -> Run:
    """The global run; UsageError when there is none."""
    run = lifecycle.current_run()
    if run is None:
        if lifecycle.active_runs():
            raise UsageError(
                f'there is no global run for wbdist.{what}: runs are open only by reinit="create_new", which are used through '
                "what init() returned, as in run.log(...)"
            )
        raise UsageError(f"you must call wbdist.init() before wbdist.{what}")
    return run


def log(data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
    """`wbdist.run.log`."""
    global_run("log()").log(data, step, commit)


def finish(exit_code: int | None = None, quiet: bool | None = None) -> None:
    """`wbdist.run.finish`; nothing without a run, as in W&B."""
    run = lifecycle.current_run()
    if run is not None:
        run.finish(exit_code, quiet=quiet)


def define_metric(  # noqa: PLR0917  (W&B's order)
    name: str,
    step_metric: str | Metric | None = None,
    step_sync: bool | None = None,
    hidden: bool | None = None,
    summary: str | None = None,
    goal: str | None = None,
    overwrite: bool | None = None,
) -> Metric:
    """`wbdist.run.define_metric`."""
    run = global_run("define_metric()")
    return run.define_metric(name, step_metric, step_sync, hidden, summary, goal, overwrite)


def mark_preempting() -> bool:
    """`wbdist.run.mark_preempting`."""
    return global_run("mark_preempting()").mark_preempting()


class NotYet:
    """What `wbdist.config` and `wbdist.summary` are before `init`: every use says so."""

    def __init__(self, what: str) -> None:
        object.__setattr__(self, "_what", what)

    def __getattr__(self, name: str) -> Any:
        global_run(f"{self._what}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        global_run(f"{self._what}.{name} = ...")

    def __getitem__(self, key: str) -> Any:
        global_run(f"{self._what}[{key!r}]")

    def __setitem__(self, key: str, value: Any) -> None:
        global_run(f"{self._what}[{key!r}] = ...")

    def __repr__(self) -> str:
        return f"<wbdist.{self._what} before init()>"
