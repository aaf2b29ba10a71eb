"""How a process ends, and with which code: so that a run that nobody finished still says the truth about its end.

`atexit` finishes what is open, and these tell it the exit code:

- `sys.excepthook` (chained) sees every uncaught exception except SystemExit: 1, KeyboardInterrupt 255 (W&B's number). That
  another job has the run is no fault of the script's: in place of a traceback there is one line, and launchers' code 69.
- `sys.exit` (wrapped) raises a SystemExit whose `code` notes when the interpreter itself asks for it, which it does only
  when nobody has caught the exception.
- `raise SystemExit(n)` reaches neither. The main module's frame tells that it did not run to its end; CPython has
  forgotten the exception by then, but holds the code on its C stack: a forked copy of the process, left to exit, reports
  it. Rejected: replacing `builtins.SystemExit` (then `except SystemExit` misses the interpreter's own), a trace function
  (every call pays), and forking for every exit (the usual `sys.exit(main())` of a large process should not pay).

Installed with the first run, in the process that opens it; a forked child starts without.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from wbdist.errors import EXIT_FENCED, Error

KEYBOARD_INTERRUPT = 255
PROBE_SECONDS = 2.0

_lock = threading.Lock()
_finishers: set[Any] = set()
_installed_in = 0
_chained = False
_noted: int | None = None
_uncaught: int | None = None
_main_frame: FrameType | None = None


def code_of(error: BaseException | None) -> int:
    """The exit code that `error` means when nobody catches it; None: a normal end."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return code_of_exit_argument(error.code)
    if isinstance(error, Error) and error.exit_code == EXIT_FENCED:
        return EXIT_FENCED
    return KEYBOARD_INTERRUPT if isinstance(error, KeyboardInterrupt) else 1


def code_of_exit_argument(argument: object) -> int:
    """What the interpreter makes of `sys.exit(argument)`."""
    if argument is None:
        return 0
    return argument if isinstance(argument, int) else 1


def finish_at_exit(run: Any) -> None:
    """`run._finish_at_exit(code)` is called when this process ends, newest run first, unless `forget(run)` came before."""
    global _installed_in, _main_frame, _noted, _uncaught  # noqa: PLW0603  (process-wide by nature)
    with _lock:
        _finishers.add(run)
        if _installed_in == os.getpid():
            return
        inherited = _installed_in != 0
        if inherited:
            _finishers.intersection_update({run})
        _installed_in = os.getpid()
        _noted = _uncaught = None
        _main_frame = _find_main_frame()
        _hook_multiprocessing()
        if not inherited:  # a fork inherits the hooks, which look at _installed_in
            atexit.register(_at_exit)
            _wrap_sys_exit()
            chain_excepthook()


def forget(run: Any) -> None:
    """The run is finished: the end of the process does not concern it any more."""
    with _lock:
        _finishers.discard(run)


def _hook_multiprocessing() -> None:
    """Children of multiprocessing leave through `os._exit`, past `atexit`, but run their own finalizers before."""
    for package in ("multiprocessing", "multiprocess"):
        process, util = sys.modules.get(f"{package}.process"), sys.modules.get(f"{package}.util")
        if process is not None and util is not None and process.parent_process() is not None:
            util.Finalize(None, _at_end_of_child, exitpriority=0)


def _at_end_of_child() -> None:
    if _installed_in == os.getpid():
        _finish_all(code_of(sys.exc_info()[1]))


def _find_main_frame() -> FrameType | None:
    """The frame of the running `__main__` module's code, when this is its thread."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return frame
        frame = frame.f_back
    return None


class _NotedExit(SystemExit):
    """What our `sys.exit` raises; called SystemExit in tracebacks, and caught as one."""

    @property
    def code(self) -> Any:  # type: ignore[override]  # a property where the base has a slot: reading is all that happens to it
        global _noted  # noqa: PLW0603
        argument = self.args[0] if self.args else None
        if sys._getframe().f_back is None:  # noqa: SLF001  (no Python code asks: it is the interpreter, on its way out)
            _noted = code_of_exit_argument(argument)
        return argument


_NotedExit.__name__ = _NotedExit.__qualname__ = "SystemExit"


def _wrap_sys_exit() -> None:
    original = sys.exit

    def noted_exit(status: Any = None, /) -> NoReturn:
        if threading.current_thread() is not threading.main_thread():  # it ends a thread, not the process
            original(status)
        raise _NotedExit(status)

    sys.exit = noted_exit


def chain_excepthook() -> None:
    """From now on uncaught exceptions are noted, and those that mean that another job has the run end the process with 69."""
    global _chained  # noqa: PLW0603
    if _chained:
        return
    _chained = True
    original: Callable[[type[BaseException], BaseException, TracebackType | None], Any] = sys.excepthook

    def noting_excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        global _uncaught  # noqa: PLW0603
        _uncaught = code_of(error)
        if _uncaught == EXIT_FENCED:
            sys.stderr.write(f"wbdist: {error}\n")
            raise SystemExit(EXIT_FENCED)  # CPython takes it for the interpreter's own from here
        original(kind, error, trace)

    sys.excepthook = noting_excepthook


def _at_exit() -> None:
    if _installed_in == os.getpid() and _finishers:
        _finish_all(exit_code())


def _finish_all(code: int) -> None:
    for run in sorted(_finishers, key=lambda run: run.opened_at, reverse=True):
        run._finish_at_exit(code)  # noqa: SLF001


def exit_code() -> int:
    """The code this ending process ends with; only meaningful inside `atexit`."""
    if _uncaught is not None:
        return _uncaught
    if _noted is not None:
        return _noted
    ended = _main_ended_normally()
    if ended:
        return 0
    if ended is None:  # no main module to look at (embedded interpreter, notebook): nothing speaks against 0
        return 0
    found = _probe()
    # A direct SystemExit whose code cannot be had: calling it a success could hide a failure.
    return 1 if found is None else found


def _main_ended_normally() -> bool | None:
    """Whether the main module's code returned; None when it is unknown or still on the stack."""
    if _main_frame is None:
        return None
    import dis

    code = _main_frame.f_code.co_code
    last = _main_frame.f_lasti
    return 0 <= last < len(code) and dis.opname[code[last]].startswith("RETURN_")


def _probe() -> int | None:
    """The code on the interpreter's stack, from a forked copy that goes on to exit with it; at most PROBE_SECONDS."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a closed or odd stream: its buffer is empty or not ours to save
            stream.flush()
    import select
    import signal

    try:
        child = os.fork()
    except OSError:
        return None
    if child == 0:
        _become_probe()
        return 0
    pidfd = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([pidfd], [], [], PROBE_SECONDS)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(status) if ended and os.WIFEXITED(status) else None


def _become_probe() -> None:
    """Leaves nothing in this copy that acts or prints on its way out."""
    _finishers.clear()
    atexit._clear()  # noqa: SLF001  (no public way; other libraries' hooks must run once, in the original)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    # C libraries' exit handlers (CUDA's among them) would act on the original's devices: let the first handler leave at once.
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)  # noqa: SLF001
