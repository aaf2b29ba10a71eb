"""Ranks made by a script itself: `wbdist.launch(fn, nprocs=2)`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from wbdist.distributed import outcomes
from wbdist.distributed.processes import SpawnedProcess, packed, start_forked, start_spawned, unpacked
from wbdist.errors import Error, UsageError
from wbdist.launch.worker import tie_to_parent
from wbdist.run.main_guard import SPAWNED, check_child, check_parent

LAUNCHER_PID = "WBDIST_LAUNCHER_PID"
"""Whose death ends a rank."""


def launch(
    fn: Callable[..., Any],
    nprocs: int = 1,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    start_method: Literal["spawn", "fork"] = "spawn",
) -> list[Any]:
    """Runs `fn(*args, **kwargs)` on `nprocs` ranks of this machine; what they returned, by rank, when all have ended well.

    Main thread, under `if __name__ == "__main__":` (or `@wbdist.main`). Inside a rank that a launcher made (RANK is set) it
    only calls `fn`, so the same script runs under `torchrun` or `wbdist launch` too, and the list has this rank's value alone.
    With `nprocs=1` it calls `fn` here, with no distributed environment. Else it starts the ranks (`fn` may be a lambda, a
    closure or a notebook's function) under the supervisor, which restarts the job after a crash or a preemption; signals to
    this process reach the ranks.

    `start_method`: "spawn" starts fresh interpreters; "fork" copies this process, which is quicker, needs no guard and takes
    anything as argument, but must be done before CUDA, process groups and threads of other libraries are.

    Raises JobFailedError (a SystemExit with the job's exit code) that names the rank which failed first, with its exception and
    traceback; UsageError for a bad argument. Without the guard the process ends with code 65 and says so, before any rank is
    started. Blocks as long as the job runs.
    """
    check_main_guard("wbdist.launch()")
    if not callable(fn):
        raise UsageError(f"launch() needs a function to run on every rank; got {type(fn).__name__}")
    if type(nprocs) is not int or nprocs < 1:
        raise UsageError(f"nprocs={nprocs!r} must be a whole number, 1 or more")
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise UsageError(
            f"args={args!r:.80} must be a tuple or list of what the function is called with; of one alone: args=(x,)"
        )
    if not isinstance(kwargs, Mapping | None):
        raise UsageError(f"kwargs={kwargs!r:.80} must be a dict of what the function is called with by name")
    if start_method not in {"spawn", "fork"}:
        raise UsageError(f"start_method={start_method!r} is not known; choose spawn or fork")
    if "RANK" in os.environ or nprocs == 1:
        return [fn(*args, **(kwargs or {}))]
    if start_method == "spawn":
        check_parent("wbdist.launch()")
    else:
        _check_fork()
    from wbdist.launch.supervisor import LaunchSpec, supervise

    call = packed(fn, tuple(args), dict(kwargs or {})) if start_method == "spawn" else (fn, tuple(args), dict(kwargs or {}))
    with tempfile.TemporaryDirectory(prefix="wbdist-outcomes-") as place:
        directory = Path(place)

        def start_ranks(environments: Sequence[Mapping[str, str]]) -> list[SpawnedProcess]:
            outcomes.forget(directory)
            started: list[SpawnedProcess] = []
            try:
                for number, environment in enumerate(environments):
                    mark = {SPAWNED: "first" if number == 0 else "other", LAUNCHER_PID: str(os.getpid())}
                    with _environment({**environment, **mark}), _interrupts_held():
                        start = start_spawned if start_method == "spawn" else start_forked
                        started.append(start(_run_rank, (call, place), f"wbdist-rank-{number}"))
            except BaseException:
                for rank in started:
                    rank.kill()
                raise
            return started

        code = supervise(LaunchSpec(nprocs=nprocs), start_ranks)
        if code != 0:
            raise outcomes.failure(directory, nprocs, code)
        return outcomes.values(directory, nprocs)


def check_main_guard(what: str = "wbdist") -> None:
    """Any process, before anything is started: see `main_guard.check_child`."""
    check_child(what)


def _check_fork() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.cuda.is_initialized():
        raise UsageError('launch(start_method="fork") after CUDA was used: its state does not survive a fork; use "spawn"')
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UsageError('launch(start_method="fork") inside a process group: ranks would share it; use "spawn"')


def _run_rank(call: bytes | tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], outcome: str) -> None:
    """Body of a started rank: the function, and the exit code that its end means."""
    tie_to_parent()
    # Its own session, so that the supervisor alone passes on Ctrl-C, and can kill the rank with all its helpers.
    os.setsid()
    rank = int(os.environ["RANK"])
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a Ctrl-C during start-up arrives here
        fn, args, kwargs = unpacked(call) if isinstance(call, bytes) else call
        outcomes.keep_value(Path(outcome), rank, fn(*args, **kwargs))
    except KeyboardInterrupt:
        # The supervisor speaks for all ranks; a traceback from each would bury it.
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit:  # also one that is an Error: it has its exit code, and has said why
        raise
    except Exception as error:  # noqa: BLE001  (as the interpreter ends a script: traceback, code)
        traceback.print_exc()
        outcomes.keep_error(Path(outcome), rank, error)
        raise SystemExit(error.exit_code if isinstance(error, Error) else 1) from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Spawned interpreters take the environment as it is when they start: libraries read it before our code runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Blocks SIGINT while a child starts; the child inherits the mask and keeps it until `fn` runs, so that Ctrl-C while
    it imports torch prints no traceback. Rejected: ignoring the signal, which would lose one sent in between."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
