"""What runs inside each rank's process before the user's script: it ties the rank's life to its supervisor's.

python -m wbdist.launch.worker [-m] script.py args...
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def tie_to_parent() -> None:
    """SIGTERM when the parent dies, whatever kills it: the job saves and leaves. Linux only; elsewhere the sentinel does it."""
    parent = os.environ.get("WBDIST_LAUNCHER_PID")
    if not sys.platform.startswith("linux") or parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before prctl
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    tie_to_parent()
    arguments = sys.argv[1:]
    if arguments and arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    # What `python script.py` does: the script's directory, not the current one, comes first.
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
