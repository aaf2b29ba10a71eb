"""Runs and projects of a server, fetched a page at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload
from urllib.parse import quote

from wbdist.errors import UsageError
from wbdist.protocol import edits, reads
from wbdist.protocol.edits import RemoteProject
from wbdist.run.remote_run import RunRecord, framed

if TYPE_CHECKING:
    from wbdist.run.reader import Api

Item = TypeVar("Item")


class Pages(Generic[Item]):
    """A sequence that is fetched as far as it is looked at: iterable (again and again), indexable, sliceable."""

    def __init__(self) -> None:
        self._found: list[Item] = []
        self._cursor: str | None = None
        self._complete = False

    def _fetch(self) -> None:
        """Adds one page to `_found` and moves `_cursor`; sets `_complete` behind the last."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Item]:
        at = 0
        while True:
            if at < len(self._found):
                yield self._found[at]
                at += 1
            elif self._complete:
                return
            else:
                self._fetch()

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """Fetches as far as needed. Raises IndexError."""
        bounds = [index] if isinstance(index, int) else [index.start or 0, index.stop if index.stop is not None else -1]
        while not self._complete and (min(bounds) < 0 or max(bounds) >= len(self._found)):
            self._fetch()
        return self._found[index]


class Runs(Pages[RunRecord]):
    """Runs of a project, in order, fetched a page at a time: iterable, indexable, with `len`."""

    def __init__(self, api: Api, entity: str, project: str, *, filters: dict[str, Any], order: str, per_page: int) -> None:
        """Use `Api.runs`."""
        super().__init__()
        self._api = api
        self.entity = entity
        self.project = project
        self.filters = filters
        self.order = order
        self.per_page = per_page
        self._total: int | None = None

    def __len__(self) -> int:
        if self._total is None:
            self._fetch()
        return self._total or 0

    def histories(
        self,
        samples: int = 500,
        keys: list[str] | None = None,
        x_axis: str = "_step",
        format: str = "default",
        stream: str = "default",
    ) -> Any:
        """The sampled histories of all these runs in one list, each row with its `run_id`; `format="pandas"` in a DataFrame."""
        if format not in {"default", "pandas"}:
            raise UsageError(f"format={format!r} is not one of: default, pandas")
        rows = [
            {**row, "run_id": run.id}
            for run in self
            for row in run.history(samples=samples, keys=keys, x_axis=x_axis, pandas=False, stream=stream)
        ]
        return rows if format == "default" else framed(rows, required=True)

    def _fetch(self) -> None:
        page = reads.read_runs(
            self._api.execute(
                reads.runs(
                    self.entity,
                    self.project,
                    filters=self.filters,
                    order=self.order,
                    cursor=self._cursor,
                    per_page=self.per_page,
                )
            )
        )
        if page is None:  # no such project
            self._total, self._complete = 0, True
            return
        self._found.extend(RunRecord(self._api, self.entity, self.project, found) for found in page.runs)
        self._total = page.total
        self._cursor = page.cursor
        self._complete = page.cursor is None

    def __repr__(self) -> str:
        return f"<Runs {self.entity}/{self.project}>"


class Project:
    """One project of an entity."""

    def __init__(self, api: Api, found: RemoteProject) -> None:
        """Use `Api.project`."""
        self._api = api
        self.id = found.id
        self.name = found.name
        self.entity = found.entity_name
        self.created_at = found.created_at
        """ISO 8601, UTC."""

    @property
    def path(self) -> list[str]:
        """[entity, name]."""
        return [self.entity, self.name]

    @property
    def url(self) -> str:
        return f"{self._api.base_url}/{quote(self.entity)}/{quote(self.name)}"

    def __repr__(self) -> str:
        return f"<Project {self.entity}/{self.name}>"


class Projects(Pages[Project]):
    """Projects of an entity, that with the newest sign of life first."""

    def __init__(self, api: Api, entity: str, per_page: int) -> None:
        """Use `Api.projects`."""
        super().__init__()
        self._api = api
        self.entity = entity
        self.per_page = per_page

    def _fetch(self) -> None:
        asked = edits.projects(self.entity, cursor=self._cursor, per_page=self.per_page)
        nodes, self._cursor = edits.read_projects(self._api.execute(asked))
        self._found.extend(Project(self._api, node) for node in nodes)
        self._complete = self._cursor is None

    def __repr__(self) -> str:
        return f"<Projects {self.entity}>"
