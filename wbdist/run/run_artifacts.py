"""What a run logged or used of artifacts, as the server tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wbdist.errors import UsageError
from wbdist.protocol import artifacts as protocol
from wbdist.run.artifacts_api import UsedArtifact
from wbdist.run.remote_lists import Pages

if TYPE_CHECKING:
    from wbdist.run.reader import Api


class RunArtifacts(Pages[UsedArtifact]):
    """Versions of artifacts, fetched a page at a time: iterable, indexable, with `len`."""

    def __init__(self, api: Api, run: tuple[str, str, str], *, used: bool, per_page: int) -> None:
        """Use `RunRecord.logged_artifacts` or `used_artifacts`."""
        if per_page < 1:
            raise UsageError(f"per_page={per_page} must be at least 1")
        super().__init__()
        self._api = api
        self._run = run
        self._used = used
        self._per_page = per_page
        self._total: int | None = None

    def __len__(self) -> int:
        if self._total is None:
            self._fetch()
        return self._total or 0

    def _fetch(self) -> None:
        asked = protocol.of_run(self._run, used=self._used, cursor=self._cursor, per_page=self._per_page)
        page = protocol.read_of_run(self._api.execute(asked))
        self._found.extend(UsedArtifact(self._api, found) for found in page.artifacts)
        self._total, self._cursor = page.total, page.cursor
        self._complete = page.cursor is None

    def __repr__(self) -> str:
        return f"<artifacts {'used' if self._used else 'logged'} by {'/'.join(self._run)}>"
