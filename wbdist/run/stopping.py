"""A person asked on the server that a run stop: its script is interrupted, as W&B's client does it.

One thread a process asks the shipper for all runs that `init` opened. The interrupt is a SIGINT to the main thread, so that a
script sees the KeyboardInterrupt it knows from Ctrl-C, also in the middle of a sleep. A `wbdist.job` has a way of its own
(`job/fence.py`): its ranks stop together and save.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable

import msgspec

INTERVAL = 2.0
"""Seconds between two questions of well under a millisecond."""

_lock = threading.Lock()
_log = logging.getLogger(__name__)
_watched: list[_Watched] = []
_watching_in = 0
"""The process whose thread watches; a forked child's runs need one of its own."""


class _Watched(msgspec.Struct):
    asked: Callable[[], bool]
    """Whether a stop was asked for."""
    say: Callable[[], None]
    act: Callable[[], object] | None
    """In place of the interrupt."""


def watch(asked: Callable[[], bool], say: Callable[[], None], act: Callable[[], object] | None = None) -> Callable[[], None]:
    """From now on `asked` is called every INTERVAL seconds; once it is true, `say` is called and the main thread interrupted,
    or `act` called in this module's thread, where its exceptions are logged.

    Returns what ends the watching."""
    global _watching_in  # noqa: PLW0603  (one thread a process)
    one = _Watched(asked, say, act)
    with _lock:
        if _watching_in != os.getpid():
            _watched.clear()
            _watching_in = os.getpid()
            threading.Thread(target=_work, name="wbdist-stop", daemon=True).start()
        _watched.append(one)
    return lambda: _forget(one)


def _forget(one: _Watched) -> None:
    with _lock:
        _watched[:] = [other for other in _watched if other is not one]


def _work() -> None:
    pause = threading.Event()
    while not pause.wait(INTERVAL):
        for one in _watched.copy():
            if one.asked():
                _forget(one)
                one.say()
                _stop(one)


def _stop(one: _Watched) -> None:
    if one.act is None:
        _interrupt()
        return
    try:
        one.act()
    except Exception:  # noqa: BLE001  (the user's function: the other runs are watched on)
        _log.exception("the function of the setting stop_fn failed")


def _interrupt() -> None:
    main = threading.main_thread()
    if main.ident is None or not main.is_alive():
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # What a shell starts in the background: the signal would be lost. This comes once the main thread runs Python again.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main.ident), ctypes.py_object(KeyboardInterrupt))
    else:
        signal.pthread_kill(main.ident, signal.SIGINT)
