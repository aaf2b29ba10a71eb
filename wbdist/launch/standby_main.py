"""The standby process: `python wbdist/launch/standby_main.py script.py args...`; started by standby.py only.

A rank that was forked from it becomes the script here, as `python script.py args...` would run it: `__main__`, `sys.argv`,
`sys.path`, exit code and traceback are those of the script. This module's own `__main__` stays alive behind it.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType


def _as_for_the_script() -> None:
    """Before anything is imported: the script's directory in the place of ours, unless Python was told not to add one."""
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[1]))  # noqa: PTH120  (pathlib may be the script's own)


def _become(path: str) -> None:
    sys.argv = sys.argv[1:]
    sys.orig_argv = [sys.executable, *sys.argv]
    main = ModuleType("__main__")
    full = os.path.abspath(path)  # noqa: PTH100
    loader = SourceFileLoader("__main__", full)
    vars(main).update({"__file__": full, "__cached__": None, "__loader__": loader, "__builtins__": __builtins__})
    sys.modules["__main__"] = main
    try:
        exec(compile(loader.get_data(full), full, "exec", dont_inherit=True), vars(main))  # noqa: S102
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  (as the interpreter ends a script, without the frames of this file)
        trace = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        raise SystemExit(1) from None


if __name__ == "__main__":
    _as_for_the_script()
    _ours = sys.modules["__main__"]
    from wbdist.launch.standby import serve

    serve()
    _become(sys.argv[1])
