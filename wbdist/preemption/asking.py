"""Asking a batch scheduler's own tool."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate

PATIENCE = 5.0
"""Seconds for one question to a scheduler; nothing waits for the answer."""


def answer_of(command: Sequence[str], env: Mapping[str, str]) -> str | None:
    """What `command` prints, None when there is no such tool, it fails, or says nothing for PATIENCE seconds."""
    if shutil.which(command[0], path=env.get("PATH")) is None:
        return None
    try:
        asked = subprocess.run(
            [*command], capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False, env=dict(env)
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout if asked.returncode == 0 else None


def local_time(text: str) -> float | None:
    """`Thu Sep  3 10:29:31 2026`, in our zone, as unix time, whatever the locale is; None for what is none."""
    parts = parsedate(text)
    try:
        return None if parts is None else time.mktime(parts)
    except (ValueError, OverflowError):
        return None
