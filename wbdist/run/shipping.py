"""A run's tie to the shipper of its journal root: told once, asked to flush, never a reason for training to fail."""

from __future__ import annotations

from pathlib import Path

from wbdist.run.shipper import client


class Shipping:
    """Of one journal. Any thread."""

    def __init__(self, root: Path, journal: Path, base_url: str, api_key: str | None) -> None:
        self._root = root
        self._journal = journal
        self._base_url = base_url
        self.api_key = api_key

    def start(self) -> None:
        """Tells the shipper, starting it when there is none; a few milliseconds. Raises InitStartError."""
        client.watch(self._root, self._journal, self._base_url, self.api_key)

    def stop_asked(self) -> bool:
        """Whether somebody asked on the server that the run's process stop. At most a second; never raises."""
        return client.standing(self._root, self._journal).stopped

    def fenced(self) -> str:
        """Why another attempt has the run, '' while none has. At most a second; never raises."""
        error = client.standing(self._root, self._journal).fenced
        return error.removeprefix("fenced: ") if error.startswith("fenced: ") else ""

    def flush(self, timeout: float, *, priority: bool = False, files: bool = False) -> client.FlushResult:
        """Waits until the server has acknowledged all that is in the journal now, at most `timeout` seconds.

        `files`: their contents too.

        Never raises for an absent server or shipper.
        """
        return client.flush(self._root, self._journal, timeout, priority=priority, files=files)
