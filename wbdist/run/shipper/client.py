"""The training process's side of the shipper: start it, tell it of a journal, ask it to flush."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class FlushResult:
    """Outcome of a flush: `acked`, and why not in `error` ('' when time ran out; 'fenced' when the run has a newer attempt)."""

    def __init__(self, acked: bool, error: str = "") -> None:
        self.acked = acked
        self.error = error

    def __bool__(self) -> bool:
        return self.acked


def watch(root: Path, journal: Path, base_url: str, api_key: str | None, env: Mapping[str, str] | None = None) -> None:
    """Any process. Tells the root's shipper of a new journal, and starts one when none answers.

    Does not wait for the shipper or any server: a few milliseconds. `root`: the `wandb` directory that holds the run
    directories. `env`: the shipper's environment, default ours. Raises InitStartError when no process can be started.
    """
    raise NotImplementedError


def flush(root: Path, journal: Path, timeout: float, *, priority: bool = False) -> FlushResult:
    """Waits until the server has acknowledged all that is now in `journal`, at most `timeout` seconds.

    A dead shipper is started again once. `priority`: before other journals (the run is being preempted). Never raises for
    an absent server: the result is then not acked.
    """
    raise NotImplementedError
