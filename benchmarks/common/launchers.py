"""Watching a launcher from outside."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def until(condition: Callable[[], object], what: str, timeout: float = 90.0) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.005)


def has_standby(launcher: subprocess.Popen[bytes]) -> bool:
    """Whether `wbdist launch` holds a warm process for the next attempt."""
    children = psutil.Process(launcher.pid).children()
    return any(Path(f"/proc/{child.pid}/comm").read_text().strip() == "wbdist-standby" for child in children)
