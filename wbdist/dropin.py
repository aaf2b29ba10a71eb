"""What `import wbdist as wandb` needs beyond our own names: W&B's small helpers."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from wbdist import settings
from wbdist.core import ids
from wbdist.run import lifecycle
from wbdist.run.handle import Run
from wbdist.run.init import finish, global_run

OF_THE_RUN = frozenset({
    "alert", "define_metric", "link_artifact", "link_model", "log_artifact", "log_code", "log_model", "mark_preempting",
    "pin_config_keys", "restore", "save", "unwatch", "upsert_artifact", "use_artifact", "use_model", "watch",
})  # fmt: skip
"""Names that W&B has on the module and on the run: on the module they are the global run's."""


def of_the_run(name: str) -> Callable[..., Any] | None:
    """The module's function for a method of the run; None when the run has no such method."""
    method = getattr(Run, name, None) if name in OF_THE_RUN else None
    if method is None:
        return None

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(global_run(f"{name}()"), name)(*arguments, **options)

    return call


# Helpers ----------------------------------------------------------------------------------------------


def generate_id(length: int = 8) -> str:
    """A new run id: `length` characters of [a-z0-9] from the system's randomness, which `random.seed` does not repeat."""
    return ids.id_from_entropy(os.urandom(2 * length), length)


def teardown(exit_code: int | None = None) -> None:
    """Finishes every open run of this process and forgets what `setup` was told. Waits as `Run.finish` does, for each run."""
    with ExitStack() as ends:
        ends.callback(settings.clear_setup)
        for run in lifecycle.active_runs():
            ends.callback(run.finish, exit_code)


def require(*features: str) -> None:
    """Takes any feature of W&B's, as scripts for its older versions ask for ("core", "service"): there is nothing to switch."""
    del features


join = finish


def termlog(string: str = "", newline: bool = True, repeat: bool = True, prefix: bool = True) -> None:
    """Prints a line on stderr as ours, unless WANDB_SILENT or WANDB_QUIET is set; with `repeat=False` each text only once."""
    _say(string, newline, repeat, prefix, warning=False)


def termwarn(string: str, newline: bool = True, repeat: bool = True, prefix: bool = True) -> None:
    """As `termlog`, also when WANDB_QUIET is set."""
    _say(string, newline, repeat, prefix, warning=True)


termerror = termwarn

_said: set[str] = set()


def _say(text: str, newline: bool, repeat: bool, prefix: bool, *, warning: bool) -> None:
    if not repeat and text in _said:
        return
    _said.add(text)
    own = settings.resolve()
    if newline and prefix:
        own.say(text, warning=warning)
    elif not (own.silent or (own.quiet and not warning)):
        print(f"wbdist: {text}" if prefix else text, end="\n" if newline else "", file=sys.stderr, flush=True)  # noqa: T201
