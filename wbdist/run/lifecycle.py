"""Opening runs, and the runs that are open in this process."""

from __future__ import annotations

import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from wbdist.core import ids
from wbdist.core.branch import BranchPoint
from wbdist.core.metrics import from_wandb
from wbdist.core.position import RunPosition
from wbdist.core.tails import JournalCopy
from wbdist.errors import AwayError, CommError, FencedError, InitStartError, UsageError
from wbdist.run import autoresume, console, machine, process_end
from wbdist.run.disabled import NoJournal
from wbdist.run.handle import Run
from wbdist.run.journal import JournalHeader, JournalWriter, Kind, journal_name
from wbdist.run.journal_format import FeedFacts
from wbdist.run.system import sampler
from wbdist.settings import Settings

if TYPE_CHECKING:
    from wbdist.run.local_history import LocalRun

REGISTER_SECONDS = 5.0
"""How long opening a run waits for the server to know it; then the shipper tells it later."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides how a run is opened. Make one with `init.make_spec`, vary it with `msgspec.structs.replace`."""

    settings: Settings
    run_id: str
    project: str
    entity: str = ""
    """Empty: the server's default for the key."""
    attempt: int = 1
    nonce: str = ""
    """Of this incarnation of the attempt; the same on all its writers. Empty: made up."""
    writer: str = "rank0"
    role: Literal["run", "feed"] = "run"
    """`feed`: this rank's rows go to an aggregator, which reads the journal; no server hears of it, nothing is announced."""
    feed: FeedFacts | None = None
    base: RunPosition | None = None
    """What this attempt continues from: step, summary, runtime."""
    earlier: tuple[JournalCopy, ...] = ()
    """Journals of earlier attempts, from the checkpoint; what this disk lacks is brought back before the run begins."""
    base_run: str = ""
    at_step: int | None = None
    fresh: tuple[str, ...] = ()
    """As in JournalHeader."""
    behind: int | None = None
    root: str = ""
    """As in JournalHeader."""
    resume: Literal["", "allow", "must", "never"] = ""
    """Whether this goes on with the run of this id; attempt and base are then found when it is opened."""
    auto_resume: bool = False
    """The id is kept in the root's file, for `resume=True` to find it, until the run has finished well."""
    branch: BranchPoint | None = None
    """The point to go on from: of another run (a fork), or of this one (a rewind)."""
    branch_point: dict[str, Any] | None = None
    """W&B's form of a fork, for a server that knows no attempts: it must be in the first word of the run."""
    id_is_given: bool = False
    cause: str = "start"
    began: float = 0.0
    """When this attempt's `_runtime` began to count, for a writer that takes over from another; 0: now."""
    rank: int = 0
    name: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] | None = None
    group: str | None = None
    job_type: str | None = None
    config: dict[str, Any] = {}
    sweep: str = ""
    """The sweep that the run is a trial of."""
    locked: dict[str, Any] = {}
    """What the sweep decided of the config."""
    metrics: tuple[dict[str, Any], ...] = ()
    """Definitions of metrics that the run has already: W&B's list, the config's `_wandb.m`."""
    allow_val_change: bool = False
    must_be_new: bool = False
    """Refuse attempt 1 when the server has a run of this id already: its history and ours would mix."""
    force: bool = False
    """Raise instead of going on with the journal alone when the server is away."""
    capture_console: bool = True
    sample: Literal["nothing", "process", "all"] = "all"
    """System metrics: of this process alone, or of the machine too; where `Settings.x_disable_stats` does not forbid it."""
    url: str | None = None
    """The run's page, when somebody else has registered the run (a feed's)."""
    away: bool = False
    """The server did not answer another rank just now: it is not asked again, the shipper will find it."""
    announce: bool = True
    """Say in one line where the run is; of several ranks one says it."""

    @property
    def is_fork(self) -> bool:
        return self.branch is not None and self.branch.run_id != self.run_id

    @property
    def may_exist(self) -> bool:
        """Whether something of this run may be there already: its id was not made up just now, and nobody (a job) who says
        where it goes on answers for it."""
        answered = self.role == "feed" or self.nonce or self.base is not None
        return not answered and (self.id_is_given or bool(self.resume) or self.branch is not None)


_lock = threading.RLock()
_active: list[Run] = []
"""Open runs of this process, oldest first."""
_current: Run | None = None
"""The global run behind `wbdist.run`, `wbdist.log`, ..."""


def new_run_id() -> str:
    """8 characters of [a-z0-9], from the system's randomness (so `random.seed` does not repeat it)."""
    return ids.id_from_entropy(os.urandom(16))


def open_run(spec: RunSpec) -> Run:
    """Opens one run of this process; any rank, not in step. The caller finishes it (as does the end of the process).

    When it returns there is a journal with a living writer. Offline and for feeds it takes a few milliseconds and waits for
    nobody; online at most `settings.init_timeout` for the embedded server and REGISTER_SECONDS for the run to be
    registered. A server that is away is said in one line and is no error (unless `spec.force`, or when only the server can tell
    what a run that is to be resumed builds upon). A run that may exist already is claimed first, against other processes here.

    Raises UsageError (a run of this id is open here; it exists and `must_be_new`; `resume` or `branch` cannot be met),
    JobAlreadyRunningError (another process here writes it), AuthenticationError, CommError when the server refuses the run,
    JournalError when the disk does.
    """
    opened_at = time.time()
    with _lock:
        if any(run.id == spec.run_id and run.writer == spec.writer for run in _active):
            raise UsageError(
                f"run id {spec.run_id!r} is in use by an open run of this process; finish that one first, or leave `id` out"
            )
    if spec.settings.mode == "disabled":
        name = spec.name or f"dummy-{spec.run_id}"
        quiet = msgspec.structs.replace(spec, name=name, capture_console=False)
        base = spec.base
        nothing = NoJournal(base.watermark.step + 1 if base else 0, base.summary if base else {})
        silent = Run(quiet, journal=nothing, shipping=None, directory=None, opened_at=opened_at)
        _set_config(silent, spec)
        return enlist(silent)

    online = spec.settings.mode in {"online", "shared"} and spec.role == "run"
    root = journal_root(spec.settings)
    with _claim(root, spec) as local:
        placed = _register(spec, local) if online else _Placed(_alone(spec, local))
        spec = placed.spec
        directory = _make_directory(root, spec.settings.mode, spec.run_id, opened_at)
        header = _header(spec, placed, opened_at)
        if spec.earlier:
            from wbdist.run import journal_copy

            journal_copy.bring_back(
                spec.earlier, root, header, lambda run_id: _make_directory(root, spec.settings.mode, run_id, opened_at)
            )
        journal = JournalWriter.create(directory / journal_name(spec.writer, spec.attempt), header)
    shipping = None
    if placed.base_url:
        from wbdist.run.shipping import Shipping

        shipping = Shipping(root, journal.path, placed.base_url, placed.api_key)
    run = Run(spec, journal=journal, shipping=shipping, directory=directory, opened_at=opened_at)
    try:
        journal.append(Kind.RUN, _facts(spec), time=opened_at)
        # W&B's place for facts of each writer's machine.
        journal.append(Kind.CONFIG, {"set": {"_wandb": {"e": {spec.writer: machine.environment()}}}}, time=opened_at)
        for arguments in from_wandb(list(spec.metrics)):
            run._define(arguments)  # noqa: SLF001
        _set_config(run, spec)
        if not (spec.nonce or spec.resume or spec.branch or spec.auto_resume or spec.role == "feed"):
            autoresume.forget(root)
        if spec.auto_resume:
            autoresume.write(root, spec.project, spec.run_id)
            run.on_finish(lambda: autoresume.forget(root) if run.exit_code == 0 else None)
        if shipping is not None:
            start_shipping(shipping, run, spec)
    except BaseException:
        run.finish(1, cause="init")
        raise
    run.url = placed.url or spec.url
    if spec.role == "run" and spec.announce:
        _announce(run, placed)
    settings = spec.settings
    if settings.save_code and not settings.disable_code and spec.role == "run" and settings.x_primary:
        run.keep_code()
    if spec.capture_console:
        run.capture_console()
    if spec.sample != "nothing" and not spec.settings.x_disable_stats:
        run.sample_system()
    return enlist(run)


def _set_config(run: Run, spec: RunSpec) -> None:
    run.config.update(spec.config)
    who = f"sweep {spec.sweep}" if spec.sweep else "the file of WANDB_SWEEP_PARAM_PATH"

    def refused(key: str, value: Any, other: Any) -> None:
        if spec.rank == 0:  # of several ranks, which do the same, one says it
            spec.settings.say(
                f'run {run.id}: config key "{key}" stays {value!r}, as {who} decided; {other!r} is ignored', warning=True
            )

    run.config.lock(spec.locked, refused)


def _header(spec: RunSpec, placed: _Placed, opened_at: float) -> JournalHeader:
    base = spec.base
    return JournalHeader(
        run_id=spec.run_id,
        project=spec.project,
        entity=spec.entity,
        attempt=spec.attempt,
        nonce=spec.nonce or os.urandom(8).hex(),
        writer=spec.writer,
        role=spec.role,
        feed=spec.feed,
        base=base.watermark if base is not None and spec.at_step is None else None,
        base_run=spec.base_run,
        at_step=spec.at_step,
        fresh=spec.fresh,
        behind=spec.behind,
        root=spec.root,
        primary=spec.settings.x_primary,
        cause=spec.cause,
        rank=spec.rank,
        host=spec.settings.host or machine.host(),
        pid=os.getpid(),
        created=spec.began or opened_at,
        online=bool(placed.base_url),
        base_url=placed.base_url,
        data_dir=placed.data_dir,
        runtime=base.runtime if base is not None else 0.0,
        summary=base.summary if base is not None else {},
    )


def _claim(root: Path, spec: RunSpec) -> AbstractContextManager[LocalRun | None]:
    if not spec.may_exist:
        return nullcontext()
    from wbdist.run import continuation

    return continuation.claim(root, spec)


def _alone(spec: RunSpec, local: LocalRun | None, problem: str = "") -> RunSpec:
    """How a run that may exist goes on without a server."""
    if not spec.may_exist:
        return spec
    from wbdist.run import continuation

    return continuation.without_server(spec, local, problem)


class _Placed(msgspec.Struct):
    """Where a run's rows go."""

    spec: RunSpec
    base_url: str = ""
    """Empty: nowhere by themselves."""
    api_key: str | None = None
    data_dir: str = ""
    """Of the embedded server; empty when it is another one."""
    url: str | None = None
    problem: str = ""


def _register(spec: RunSpec, local: LocalRun | None) -> _Placed:
    """Finds the server and makes it know the run, so that name and page are there when `init` returns."""
    from wbdist.run import backend, registration

    if spec.away and not spec.settings.base_url:
        server, problem = None, "the embedded server is not up"
    else:
        server, problem = backend.try_server(spec.settings)
    if server is None:
        if spec.force:
            raise InitStartError(problem)
        return _Placed(_alone(spec, local, problem), problem=problem)
    data_dir = spec.settings.data_dir if server.embedded else ""
    if spec.away:
        return _Placed(_alone(spec, local), server.base_url, server.api_key, data_dir)
    try:
        known, spec = registration.register(server, spec, local, REGISTER_SECONDS)
    except AwayError as error:
        if spec.force:
            raise CommError(str(error)) from error
        return _Placed(_alone(spec, local, str(error)), server.base_url, server.api_key, data_dir, problem=str(error))
    return _Placed(spec, server.base_url, server.api_key, data_dir, url=registration.page(server.base_url, known))


def start_shipping(shipping: Any, run: Run, spec: RunSpec) -> None:
    """Tells the shipper of the run; that there is none is said, and raised with `spec.force` alone."""
    try:
        shipping.start()
    except InitStartError as error:
        if spec.force:
            raise
        spec.settings.say(
            f"run {run.id}: {error}; rows are kept on disk, send them later with: wbdist sync {run.dir}", warning=True
        )


def _announce(run: Run, placed: _Placed) -> None:
    settings = run.settings
    # Of a run that goes on, earlier attempts lie in directories of their own.
    journals = Path(run.dir).parent.parent if run.attempt > 1 else Path(run.dir).parent
    if placed.url:
        settings.say(f"run {run.name} at {placed.url}")
    elif placed.base_url:
        settings.say(
            f"run {run.id}: {placed.problem}; training goes on, rows are kept on disk and sent when it is back", warning=True
        )
    elif placed.problem:
        settings.say(
            f"run {run.id}: {placed.problem}; training goes on, send the rows later with: wbdist sync {journals}",
            warning=True,
        )
    else:
        settings.say(f"run {run.id} is offline; send it later with: wbdist sync {journals}")


def _facts(spec: RunSpec) -> dict[str, Any]:
    """Payload of the RUN record; absent facts are left out."""
    git = None if spec.settings.disable_git else machine.git(Path.cwd())
    facts: dict[str, Any] = {
        "display_name": spec.name,
        "group": spec.group,
        "job_type": spec.job_type,
        "notes": spec.notes,
        "tags": list(spec.tags) if spec.tags is not None else None,
        "host": spec.settings.host or machine.host(),
        "program": spec.settings.program or machine.program(),
        "commit": git.commit if git else None,
        "repo": git.remote if git else None,
        "sweep": spec.sweep,
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def journal_root(settings: Settings) -> Path:
    """`<root_dir>/wandb`, as W&B has it; when that cannot be written, with a warning, one below the temporary directory."""
    root = Path(settings.root_dir) / "wandb"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK | os.X_OK):
            return root
        reason = "no permission to write"
    except OSError as error:
        reason = str(error)
    import tempfile

    fallback = Path(tempfile.gettempdir()) / f"wbdist-{os.getuid()}" / "wandb"
    fallback.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.say(f"{root} cannot be used ({reason}); runs are kept in {fallback}", warning=True)
    return fallback


def _make_directory(root: Path, mode: str, run_id: str, opened_at: float) -> Path:
    """A fresh `[offline-]run-YYYYMMDD_HHMMSS-<id>` (local time, as W&B's), with `-N` when another process was there first."""
    stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(opened_at))
    name = f"{'offline-' if mode == 'offline' else ''}run-{stamp}-{run_id}"
    for number in range(10_000):
        directory = root / (f"{name}-{number}" if number else name)
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        (directory / "files").mkdir()
        return directory
    raise UsageError(f"{root / name} and 9,999 more exist already: too many runs of one id in one second")


def enlist(run: Run) -> Run:
    """From now on the run is open in this process, and finished at its end."""
    with _lock:
        _active.append(run)
    run.on_finish(lambda: _delist(run))
    process_end.finish_at_exit(run)
    return run


def _delist(run: Run) -> None:
    global _current  # noqa: PLW0603  (the thin module-level convenience of the W&B API)
    with _lock:
        if run in _active:
            _active.remove(run)
        if _current is run:
            _current = None


def active_runs() -> list[Run]:
    """The open runs of this process, oldest first."""
    with _lock:
        return list(_active)


def finish_previous() -> None:
    """Finishes the open runs, newest first, before the next one is opened. Waits and raises as `Run.finish`, for each."""
    for run in reversed(active_runs()):
        with suppress(FencedError):  # said already, and no matter of the next run's
            run.finish(0)


def current_run() -> Run | None:
    """The global run: the last one opened without `reinit="create_new"`, while it is open."""
    return _current


def set_current(run: Run) -> None:
    global _current  # noqa: PLW0603
    with _lock:
        _current = run


def _after_fork() -> None:
    """A forked child starts without runs; using the parent's raises."""
    global _current, _lock  # noqa: PLW0603
    _lock = threading.RLock()
    _current = None
    for run in _active:
        run._disown()  # noqa: SLF001
    _active.clear()
    console.forget_all()
    sampler.forget_all()


os.register_at_fork(after_in_child=_after_fork)
