"""What has to be remembered of a server that does not say what it has: W&B's own."""

from __future__ import annotations

from pathlib import Path

import msgspec

from wbdist.errors import JournalCorruptError


class ForeignMemory:
    """Of one journal and one server, in a file beside the journal, so that sending everything again after a restart overwrites
    what was sent instead of appending."""

    def __init__(self, journal: Path, base_url: str) -> None:
        self._path = journal.with_name(journal.name + ".offsets")
        self._base_url = base_url

    def read(self) -> dict[str, int] | None:
        """What `keep` kept; None when nothing was."""
        return self._all().get(self._base_url)

    def keep(self, offsets: dict[str, int]) -> None:
        """stream -> the server's line number of our first; of alerts, how many were sent."""
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.write_bytes(msgspec.json.encode({**self._all(), self._base_url: offsets}))
        fresh.replace(self._path)

    def _all(self) -> dict[str, dict[str, int]]:
        if not self._path.exists():
            return {}
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, dict[str, int]])
        except msgspec.DecodeError as error:
            raise JournalCorruptError(
                f"{self._path} does not say what the server has ({error}); without it, what was sent may be there twice"
            ) from error
