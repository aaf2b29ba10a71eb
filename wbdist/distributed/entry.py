"""`@wbdist.main`: the main guard, and the start of the work, in one line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

from wbdist.errors import UsageError
from wbdist.run.main_guard import inheriting

F = TypeVar("F", bound=Callable[..., Any])


@overload
def main(fn: F) -> F: ...


@overload
def main(*, nprocs: int) -> Callable[[F], F]: ...


def main(fn: F | None = None, *, nprocs: int | None = None) -> F | Callable[[F], F]:
    """Decorates the function that is the script. Runs it at once when the file is the program; returns it unchanged when the
    file is imported, or loaded again by a spawned child.

        @wbdist.main                    @wbdist.main(nprocs=2)
        def main(): ...                 def train(): ...

    Must be the last thing of the file: the function runs where it stands, so what comes later is not defined yet. With
    `nprocs` it is `wbdist.launch(fn, nprocs)`: ranks of its own, but under `torchrun` and `wbdist launch` just this rank's
    call. The function takes no arguments; what it raises ends the program as usual.

    Raises UsageError when something follows that the function would miss, naming the line.
    """
    if fn is None:
        return lambda given: _run(given, nprocs)
    return _run(fn, nprocs)


def _run(fn: F, nprocs: int | None) -> F:
    if not callable(fn):
        raise UsageError(f"@wbdist.main decorates a function; got {type(fn).__name__}")
    if fn.__module__ != "__main__" or inheriting():
        return fn
    program = sys.modules["__main__"]
    script = getattr(program, "__file__", None)
    if script is not None:
        _check_last(Path(script), fn)
    # Its name is bound only after the decorator; children find it in the script by that name.
    setattr(program, fn.__name__, fn)
    if nprocs is None:
        fn()
    else:
        from wbdist.distributed.bootstrap import launch

        launch(fn, nprocs)
    return fn


def _check_last(script: Path, fn: Callable[..., Any]) -> None:
    code = getattr(fn, "__code__", None)
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    if code is None:
        return
    for statement in tree.body:
        if statement.lineno > code.co_firstlineno and not isinstance(statement, ast.Pass) and not _is(statement, fn.__name__):
            raise UsageError(
                f"line {statement.lineno} of {script} comes after the function that @wbdist.main runs at once, which would "
                f"miss it: make {fn.__name__}() the last thing of the script (it needs no `if __name__ == ...` of its own)"
            )


def _is(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and statement.name == name
