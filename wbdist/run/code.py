"""The source of a run, as an artifact."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wbdist.run.artifacts import Artifact

if TYPE_CHECKING:
    from wbdist.run.handle import Run

_SKIPPED = frozenset({"wandb", ".wandb", "node_modules", "__pycache__", ".git", ".hg", ".tox", ".mypy_cache"})


def code_artifact(
    run: Run, root: Path, name: str | None, include: Callable[..., bool] | None, exclude: Callable[..., bool] | None
) -> Artifact | None:
    """See `Run.log_code`."""
    chosen = _two(include) if include is not None else _is_python
    left_out = _two(exclude) if exclude is not None else _never
    whole = root.absolute()
    artifact = Artifact(name or f"source-{run.project}-{_program(run)}"[:128], "code")
    for path in _files(whole):
        if chosen(str(path), str(whole)) and not left_out(str(path), str(whole)):
            artifact.add_file(path, path.relative_to(whole).as_posix())
    return artifact if artifact.entries() else None


def _files(root: Path) -> Iterator[Path]:
    """All files below, but for what no person writes: virtual environments, caches, run directories, checkouts' insides."""
    for directory, below, names in os.walk(root):
        below[:] = sorted(one for one in below if one not in _SKIPPED and not Path(directory, one, "pyvenv.cfg").exists())
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file():
                yield path


def _two(function: Callable[..., bool]) -> Callable[[str, str], bool]:
    """W&B takes functions of (path) and of (path, root)."""
    if len(inspect.signature(function).parameters) > 1:
        return function
    return lambda path, _root: function(path)


def _is_python(path: str, _root: str) -> bool:
    return path.endswith(".py")


def _never(_path: str, _root: str) -> bool:
    return False


def _program(run: Run) -> str:
    from wbdist.run import machine

    program = run.settings.program or machine.program()
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in program)
