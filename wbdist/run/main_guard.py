"""Whether the main script is safe to be loaded again by a spawned child, and what to tell its author when it is not.

A spawned child loads its parent's main script to find the functions in it. What that script does outside of a main guard it
then does in every child: starting children, without end, or opening runs, one a child. Two looks, both before any harm:
in the parent, at the source of the line that is running, before the first child is started; in a child, when it comes past.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from wbdist.errors import EXIT_FAILED_FOR_GOOD, MainGuardError

if TYPE_CHECKING:
    import ast

SPAWNED = "WBDIST_SPAWNED"
"""Set in the environment of children that wbdist spawned: "first" in the one that speaks for all, else "other"."""
_SPAWN_WORDS = frozenset({"__name__", "current_process"})
"""What a guard asks for."""


class Line(msgspec.Struct, frozen=True):
    """A line of the main script."""

    script: str
    number: int
    text: str


def inheriting() -> bool:
    """Whether this process is a spawned child that is still loading its parent's main module (of either package)."""
    for package in ("multiprocess", "multiprocessing"):
        module = sys.modules.get(f"{package}.process")
        if module is not None and getattr(module.current_process(), "_inheriting", False):
            return True
    return False


def main_script() -> str | None:
    """The file that spawned children load; None in a session (a notebook, `python -c`, a script from standard input)."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return script if script is not None and Path(script).exists() else None


def check_child(what: str) -> None:
    """Any process: nothing, but in a child that is just loading an unguarded script.

    There it raises MainGuardError; in a child that wbdist spawned it ends the process with code 65 instead, and only the
    first of them prints the message: one clear text, and no traceback through four files of the standard library from each.
    """
    if not inheriting():
        return
    line = _running(("__mp_main__",))
    message = _message(what, line, "It ran in a child process that was only loading the script to find its functions.")
    if SPAWNED in os.environ:
        _leave(message if os.environ[SPAWNED] == "first" else "")
    raise MainGuardError(message)


def check_parent(what: str) -> None:
    """Main thread, before children are spawned: ends the process with code 65 and one message when the line of the main
    script that is running stands outside of any condition, so that every child would come past it, too.

    Where the source does not tell (a condition of another kind, a notebook), it is left to `check_child`.
    """
    line = _running(("__main__",))
    if line is None or line.script != main_script():
        return
    import ast

    try:
        tree = ast.parse(Path(line.script).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    if _may_be_guarded(tree, line.number):
        return
    _leave(_message(what, line, "Each child process would load the script to find its functions, and run this line again."))


def _running(names: tuple[str, ...]) -> Line | None:
    """Where the main module's own code stands, when this thread runs it."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") in names:
            script = frame.f_code.co_filename
            return Line(script, frame.f_lineno, _text(script, frame.f_lineno))
        frame = frame.f_back
    return None


def _text(script: str, number: int) -> str:
    try:
        lines = Path(script).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def _may_be_guarded(tree: ast.Module, number: int) -> bool:
    """Whether anything on the way to the line is conditional, or something before it asked for the module's name."""
    import ast

    statements = tree.body
    while True:
        here = None
        for statement in statements:
            decorators = [decorator.lineno for decorator in getattr(statement, "decorator_list", ())]
            if min([statement.lineno, *decorators]) > number:
                break
            if number <= (statement.end_lineno or statement.lineno):
                here = statement
                break
            if isinstance(statement, ast.If) and _SPAWN_WORDS & _words(statement.test):
                return True  # such as: if __name__ != "__main__": sys.exit()
        if here is None:
            return False
        # Where a definition runs, it is a decorator: such as @wbdist.main, which looks for itself.
        if isinstance(here, ast.If | ast.Match | ast.While | ast.FunctionDef):
            return True
        statements = [inner for inner in ast.iter_child_nodes(here) if isinstance(inner, ast.stmt)]
        if not statements:
            return False


def _words(node: ast.expr) -> set[str]:
    import ast

    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} | {
        inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)
    }


def _message(what: str, line: Line | None, why: str) -> str:
    script = line.script if line is not None else str(getattr(sys.modules.get("__mp_main__"), "__file__", None) or sys.argv[0])
    where = f"line {line.number} of {script}" if line is not None else script
    text = line.text if line is not None and line.text else "main()"
    shown = f"\n    {line.number} | {line.text}\n" if line is not None else ""
    return f"""\
{what} in {where} is not under a main guard.
{shown}
{why} No work was started. Put what starts the work under a guard:

    if __name__ == "__main__":
        {text}

or into a function that is decorated with @wbdist.main, as the last thing of the script.
"""


def _leave(message: str) -> None:
    if message:
        sys.stderr.write(f"MainGuardError: {message}")
        sys.stderr.flush()
    raise SystemExit(EXIT_FAILED_FOR_GOOD)
