"""Ranks made by a script itself: `wbdist.launch(fn, nprocs=2)`, and the check that keeps it from making them for ever."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from wbdist.distributed.processes import SpawnedProcess, inheriting, packed, start_spawned, unpacked
from wbdist.errors import EXIT_FAILED_FOR_GOOD, Error, MainGuardError, UsageError
from wbdist.launch.worker import tie_to_parent

SPAWNED = "WBDIST_SPAWNED"
"""Set in the environment of ranks that `launch` spawned."""
LAUNCHER_PID = "WBDIST_LAUNCHER_PID"
"""Whose death ends a rank."""

GUARD_MESSAGE = """\
{what} ran while this process was only loading {script}.
It is a child that re-executes the script to find its function; without a guard it would start children itself, without end.
Put what starts the work under a guard:

    if __name__ == "__main__":
        wbdist.launch(train, nprocs=2)
"""


def launch(fn: Callable[..., Any], nprocs: int = 1, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """Runs `fn(*args, **kwargs)` on `nprocs` ranks of this machine; returns when all have ended well.

    Main thread, under `if __name__ == "__main__":`. Inside a rank that a launcher made (RANK is set) it only calls `fn`, so
    the same script runs under `torchrun` or `wbdist launch` too. With `nprocs=1` it calls `fn` here, with no distributed
    environment. Else it spawns the ranks (`fn` may be a lambda or closure) under the supervisor, which restarts the job after
    a crash or a preemption; signals to this process reach the ranks.

    Raises SystemExit with the job's exit code when that is not 0, MainGuardError without the guard, UsageError for a bad
    `nprocs`. Blocks as long as the job runs.
    """
    check_main_guard("wbdist.launch()")
    if not callable(fn):
        raise UsageError(f"launch() needs a function to run on every rank; got {type(fn).__name__}")
    if type(nprocs) is not int or nprocs < 1:
        raise UsageError(f"nprocs={nprocs!r} must be a whole number, 1 or more")
    if "RANK" in os.environ or nprocs == 1:
        fn(*args, **(kwargs or {}))
        return
    from wbdist.launch.supervisor import LaunchSpec, supervise

    call = packed(fn, tuple(args), dict(kwargs or {}))

    def start_ranks(environments: Sequence[Mapping[str, str]]) -> list[SpawnedProcess]:
        started: list[SpawnedProcess] = []
        try:
            for number, environment in enumerate(environments):
                with _environment({**environment, SPAWNED: "1", LAUNCHER_PID: str(os.getpid())}), _interrupts_held():
                    started.append(start_spawned(_run_rank, (call,), f"wbdist-rank-{number}"))
        except BaseException:
            for rank in started:
                rank.kill()
            raise
        return started

    code = supervise(LaunchSpec(nprocs=nprocs), start_ranks)
    if code != 0:
        raise SystemExit(code)


def check_main_guard(what: str = "wbdist") -> None:
    """Any process, before anything is started: raises MainGuardError in a child that is re-executing an unguarded script.

    In a rank spawned by `launch` it ends the process with code 65 instead, and only rank 0 prints the message: one
    clear text, and no traceback through four files of the standard library for each rank.
    """
    if not inheriting():
        return
    message = GUARD_MESSAGE.format(what=what, script=_main_script())
    if SPAWNED not in os.environ:
        raise MainGuardError(message)
    if os.environ.get("RANK") == "0":
        sys.stderr.write(f"MainGuardError: {message}")
    raise SystemExit(EXIT_FAILED_FOR_GOOD)


def _main_script() -> str:
    return str(getattr(sys.modules.get("__mp_main__") or sys.modules.get("__main__"), "__file__", None) or sys.argv[0] or "?")


def _run_rank(call: bytes) -> None:
    """Body of a spawned rank: the function, and the exit code that its end means."""
    tie_to_parent()
    # Its own session, so that the supervisor alone passes on Ctrl-C, and can kill the rank with all its helpers.
    os.setsid()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a Ctrl-C during start-up arrives here
        fn, args, kwargs = unpacked(call)
        fn(*args, **kwargs)
    except KeyboardInterrupt:
        # The supervisor speaks for all ranks; a traceback from each would bury it.
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit:  # also one that is an Error: it has its exit code, and has said why
        raise
    except Exception as error:  # noqa: BLE001  (as the interpreter ends a script: traceback, code)
        traceback.print_exc()
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
