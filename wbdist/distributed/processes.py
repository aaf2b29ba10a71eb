"""Processes by `multiprocess`, and, beside the pool, the only place that imports it.

`multiprocess` is the standard library's `multiprocessing` with dill as its pickler: lambdas, closures and functions of a
notebook can be sent to a spawned child. Its objects and the standard library's do not mix (a queue of one handed to a
process of the other raises, or hangs at exit), so everything of ours that makes such objects comes through here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wbdist.errors import UsageError
from wbdist.run.main_guard import main_script

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext


def spawn_context() -> SpawnContext:
    """`multiprocess`'s spawn context. Imported on demand: dill takes 30 ms, which runs without children need not pay."""
    import multiprocess

    context: SpawnContext = multiprocess.get_context("spawn")
    return context


def start_spawned(target: Callable[..., None], args: tuple[Any, ...], name: str) -> SpawnedProcess:
    """Starts `target(*args)` in a fresh interpreter with this process's environment as it is now.

    Main thread, under a `__main__` guard. `args` must be plain; send anything else as the bytes of `packed`.
    """
    process = spawn_context().Process(target=target, args=args, name=name)
    with session_hidden():
        process.start()
    return SpawnedProcess(process)


@contextmanager
def session_hidden() -> Iterator[None]:
    """The main module of a script read from standard input says that its file is `<stdin>`, which a child cannot load."""
    program = sys.modules["__main__"].__dict__
    if "__file__" not in program or main_script() is not None:
        yield
        return
    claimed = program.pop("__file__")
    try:
        yield
    finally:
        program["__file__"] = claimed


def start_forked(target: Callable[..., None], args: tuple[Any, ...], name: str) -> SpawnedProcess:
    """Starts `target(*args)` in a copy of this process, with nothing of its signal handlers. `args` may be anything."""
    import multiprocess

    process = multiprocess.get_context("fork").Process(target=_with_default_signals, args=(target, args), name=name)
    process.start()
    return SpawnedProcess(process)


def _with_default_signals(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """The parent's handlers would act on the parent's pipes and files, which this copy has open too."""
    default_signals()
    target(*args)


def default_signals() -> None:
    """Any handler of Python's is undone, as in a fresh interpreter; main thread."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def dumped(value: Any) -> bytes:
    """`value` by dill. Raises whatever an object's own way of being pickled raises.

    Where children load the main script, its classes go by name, so that they are the same there.
    """
    from multiprocess.reduction import ForkingPickler

    return bytes(ForkingPickler.dumps(value, recurse=True, byref=main_script() is not None))


def loaded(data: bytes) -> Any:
    from multiprocess.reduction import ForkingPickler

    return ForkingPickler.loads(data)


def packed(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """A call as bytes for `unpacked` in a spawned child. Raises UsageError when some of it cannot be sent.

    A function of the main script goes by name, so that in the child it shares the script's globals and classes. Anything
    else of `__main__` (lambdas, closures, a notebook's functions) goes by value, with the globals it uses: they may have
    been made under the guard, where the child does not look.
    """
    from multiprocess.reduction import ForkingPickler

    main = sys.modules["__main__"]
    by_name = main_script() is not None and getattr(main, getattr(fn, "__name__", ""), None) is fn
    try:
        return bytes(ForkingPickler.dumps((fn, args, kwargs), recurse=not by_name, byref=by_name))
    except Exception as error:  # dill raises whatever an object's own __reduce__ raises
        raise UsageError(f"the function or its arguments cannot be sent to another process: {error}") from error


def unpacked(call: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    from multiprocess.reduction import ForkingPickler

    fn, args, kwargs = ForkingPickler.loads(call)
    return fn, args, kwargs


class SpawnedProcess:
    """A spawned process with the interface of `subprocess.Popen` that a supervisor needs."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """Does not block."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits at most `timeout` seconds; the exit code, or None when it still runs."""
        self._process.join(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """No-op when the process has ended: its pid may belong to somebody else by now."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
