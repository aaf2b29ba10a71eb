"""What a run says of the machine and code it ran on: cheap facts from files and `sys`, no subprocess, no network.

Everything here is best effort and bounded: a missing or odd fact is left out, never an error, since a broken git
checkout is no reason to stop a training job.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

_MAX_CONFIG_BYTES = 256 * 1024


def program() -> str:
    """Path of the running script relative to the working directory, or `-c`, `<interactive>`, `-m package`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return f"-m {spec.name.removesuffix('.__main__')}"
    path: str | None = getattr(main, "__file__", None)
    if not path:
        return "-c" if sys.argv and sys.argv[0] == "-c" else "<interactive>"
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def host() -> str:
    return os.uname().nodename


def in_notebook() -> bool:
    """Whether this is a Jupyter or IPython session (known by the shell's class, IPython is not imported)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None


def environment() -> dict[str, Any]:
    """Facts for the run's `environment` entry."""
    return {
        "os": f"{os.uname().sysname}-{os.uname().release}",
        "python": ".".join(map(str, sys.version_info[:3])),
        "host": host(),
        "executable": sys.executable,
        "program": program(),
        "args": sys.argv[1:],
        "root": str(Path.cwd()),
        "pid": os.getpid(),
        "cpu_count": os.cpu_count() or 0,
    }


class Git:
    """The checkout around a directory, read from its files."""

    def __init__(self, root: Path, commit: str, remote: str) -> None:
        self.root = root
        self.commit = commit
        """HEAD's SHA; empty when there is no commit yet."""
        self.remote = remote
        """URL of `origin` without credentials; empty when there is none."""


def git(start: Path) -> Git | None:
    """The checkout that `start` lies in, None outside one. Reads at most a handful of small files."""
    for directory in (start, *start.parents):
        dot_git = directory / ".git"
        try:
            if dot_git.is_file():  # a worktree or a submodule: "gitdir: <path>"
                pointed = dot_git.read_text(errors="replace").partition(":")[2].strip()
                return _read_git(directory, (directory / pointed).resolve())
            if dot_git.is_dir():
                return _read_git(directory, dot_git)
        except OSError:
            return None
    return None


def _read_git(root: Path, git_dir: Path) -> Git:
    common_file = git_dir / "commondir"
    common = (git_dir / common_file.read_text().strip()).resolve() if common_file.is_file() else git_dir
    return Git(root, _head(git_dir, common), _origin(common / "config"))


def _head(git_dir: Path, common: Path) -> str:
    try:
        head = (git_dir / "HEAD").read_text().strip()
    except OSError:
        return ""
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    for base in (git_dir, common):
        try:
            return (base / name).read_text().strip()
        except OSError:
            continue
    try:
        for line in (common / "packed-refs").read_text().splitlines():
            sha, _, ref = line.partition(" ")
            if ref == name:
                return sha
    except OSError:
        return ""
    return ""


def _origin(config: Path) -> str:
    # Not configparser: git's format allows what it refuses (repeated keys, tab-indented lines, no value).
    try:
        with config.open(errors="replace") as lines:
            text = lines.read(_MAX_CONFIG_BYTES)
    except OSError:
        return ""
    section = re.search(r'^\[remote "origin"\]\s*\n((?:(?!\[).*\n?)*)', text, re.MULTILINE)
    url = re.search(r"^\s*url\s*=\s*(\S+)", section[1], re.MULTILINE) if section else None
    return without_credentials(url[1]) if url else ""


def without_credentials(url: str) -> str:
    """`url` without user and password; an ssh address keeps its user, which is part of the address."""
    if url.startswith("ssh://"):
        return re.sub(r"^(ssh://[^:/@]*):[^@/]*@", r"\1@", url)
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", url)


def default_project(found: Git | None, directory: Path) -> str:
    """W&B's rule: the checkout's directory name and the path below it; outside a checkout `uncategorized`."""
    if found is None:
        return "uncategorized"
    below = directory.relative_to(found.root).parts if directory.is_relative_to(found.root) else ()
    name = "-".join([found.root.name, *(["_".join(below)] if below else [])])
    return re.sub(r"[/\\#?%:]", "_", name)[:128] or "uncategorized"
