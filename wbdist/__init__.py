"""Tracked, resumable, preemption-tolerant PyTorch jobs, with W&B's names for everything W&B has.

The run client is loaded at once, since a script that imports this wants to log soon; everything else (jobs, launching,
the read API) when it is first used. Nothing here loads torch, numpy or the server.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from wbdist.dropin import of_the_run
from wbdist.errors import AuthenticationError, CommError, ConfigError, Error, ShutdownError, UsageError
from wbdist.run import lifecycle as _lifecycle
from wbdist.run.absent import absent
from wbdist.run.handle import Run
from wbdist.run.init import NotYet, define_metric, finish, init, log, mark_preempting
from wbdist.settings import Settings, setup

__version__ = "0.1.0"

__all__ = [
    "AlertLevel",
    "Api",
    "Artifact",
    "AuthenticationError",
    "CommError",
    "ConfigError",
    "Error",
    "Histogram",
    "Html",
    "Image",
    "JobFailedError",
    "LatePolicy",
    "Pool",
    "Run",
    "Settings",
    "ShutdownError",
    "Table",
    "TaskFailedError",
    "UsageError",
    "WorkerLostError",
    "checkpoints",
    "config",
    "define_metric",
    "finish",
    "init",
    "init_ranks",
    "job",
    "join",
    "launch",
    "log",
    "login",
    "main",
    "mark_preempting",
    "require",
    "restore",
    "run",
    "sdk",
    "setup",
    "summary",
    "teardown",
    "termerror",
    "termlog",
    "termwarn",
    "util",
]

_LAZY = {
    "AlertLevel": ("wbdist.run.alerts", "AlertLevel"),
    "Api": ("wbdist.run.reader", "Api"),
    "Artifact": ("wbdist.run.artifacts", "Artifact"),
    "Histogram": ("wbdist.run.media.histogram", "Histogram"),
    "Html": ("wbdist.run.media.html", "Html"),
    "Image": ("wbdist.run.media.image", "Image"),
    "JobFailedError": ("wbdist.distributed.outcomes", "JobFailedError"),
    "LatePolicy": ("wbdist.distributed.lateness", "LatePolicy"),
    "Pool": ("wbdist.distributed.pool", "Pool"),
    "Table": ("wbdist.run.media.table", "Table"),
    "TaskFailedError": ("wbdist.distributed.pool_keeper", "TaskFailedError"),
    "WorkerLostError": ("wbdist.distributed.pool_keeper", "WorkerLostError"),
    "checkpoints": ("wbdist.job.standalone", "checkpoints"),
    "init_ranks": ("wbdist.distributed.ranks", "init_ranks"),
    "job": ("wbdist.job", "job"),
    "launch": ("wbdist.distributed.bootstrap", "launch"),
    "join": ("wbdist.dropin", "join"),
    "login": ("wbdist.run.login", "login"),
    "main": ("wbdist.distributed.entry", "main"),
    "restore": ("wbdist.run.restoring", "restore"),
    "require": ("wbdist.dropin", "require"),
    "sdk": ("wbdist.sdk", ""),
    "teardown": ("wbdist.dropin", "teardown"),
    "termerror": ("wbdist.dropin", "termerror"),
    "termlog": ("wbdist.dropin", "termlog"),
    "termwarn": ("wbdist.dropin", "termwarn"),
    "util": ("wbdist.util", ""),
}
"""public name -> (module, name in it; '' for the module itself)"""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return _load(name)
    if (found := of_the_run(name)) is not None:
        return found
    if (error := absent(name)) is not None:
        raise error
    raise AttributeError(f"module 'wbdist' has no attribute {name!r}; public names are: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load(name: str) -> Any:
    module, attribute = _LAZY[name]
    found = import_module(module)
    value = getattr(found, attribute) if attribute else found
    if name not in _Package.SHADOWED:
        globals()[name] = value
    return value


class _Package(ModuleType):
    """`wbdist.run`, `wbdist.job` and `wbdist.launch` are public names and subpackages at once. The public name wins on the
    attribute; `from wbdist.run.x import y` and `import wbdist.run.x` find the subpackage all the same, in sys.modules.
    """

    SHADOWED = frozenset({"run", "job", "launch", "config", "summary"})

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        # dill sends a module by name only if it is exactly a ModuleType: a notebook's function that uses us could not be sent.
        return import_module, (self.__name__,)

    @property
    def run(self) -> Run | None:
        """The global run, None when there is none."""
        return _lifecycle.current_run()

    @property
    def config(self) -> Any:
        run = _lifecycle.current_run()
        return NotYet("config") if run is None else run.config

    @property
    def summary(self) -> Any:
        run = _lifecycle.current_run()
        return NotYet("summary") if run is None else run.summary

    @property
    def job(self) -> Any:
        return _load("job")

    @property
    def launch(self) -> Any:
        return _load("launch")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _Package.SHADOWED:
            if isinstance(value, ModuleType):
                return  # the import system, binding a subpackage to its parent
            raise AttributeError(f"wbdist.{name} cannot be assigned")
        super().__setattr__(name, value)


for _name in _Package.SHADOWED & set(globals()):
    del globals()[_name]  # subpackages that the imports above have bound
sys.modules[__name__].__class__ = _Package
