"""What runs in a rank's process before the user's script: it ties the rank's life to its supervisor's, then becomes the script.

    python wbdist/launch/worker.py script.py args...        python wbdist/launch/worker.py -m module args...

It ends in `exec`, not in `runpy`, so that the script is `__main__` in every respect: what spawned children re-import, what
tracebacks begin with, how its exit code comes about. The tie survives exec. The price is a bare interpreter start, 13 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
LAUNCHER_PID = "WBDIST_LAUNCHER_PID"


def tie_to_parent() -> None:
    """Any rank, first thing: SIGTERM when the supervisor dies, whatever kills it. The job saves and leaves; what does not is
    killed by the sentinel (sentinel.py). Linux only; elsewhere the sentinel alone does both. Nothing without a supervisor.
    """
    parent = os.environ.get(LAUNCHER_PID)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before prctl
        os.kill(os.getpid(), signal.SIGTERM)


def command_for(arguments: list[str], *, module: bool) -> list[str]:
    """The command line of one rank that runs `arguments` (script or module name first) with this interpreter."""
    # -I -S: the first interpreter needs nothing but this file; the script's own sees the environment as usual.
    return [sys.executable, "-I", "-S", __file__, *(["-m"] if module else []), *arguments]


def main() -> None:
    tie_to_parent()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # noqa: S606  (no shell wanted)


if __name__ == "__main__":
    main()
