"""`Api`: runs as the server has them, with W&B's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any
from urllib.parse import quote, urlsplit

from wbdist.errors import CommError, UsageError
from wbdist.protocol import operations, reads
from wbdist.protocol.reads import RemoteAttempt, RemoteRun
from wbdist.run import backend
from wbdist.run.connection import Connection
from wbdist.settings import Settings, resolve

_IMMUTABLE = re.compile(r"[^:]+:[0-9]+")
PAGE_STEPS = 1000
"""Steps asked for at a time: what W&B's server answers at most."""


class RunNotFoundError(CommError, ValueError):
    """The server has no such run or project (or this key may not see it)."""


class Api:
    """Reads runs from a server; any process. Requests block at most `timeout` seconds each.

    `overrides`: {"entity", "project", "base_url"} used where a path leaves them out. Without a configured server it
    reads from the embedded one of the data directory, starting it when it is not running.
    """

    def __init__(
        self,
        overrides: Mapping[str, str] | None = None,
        timeout: float | None = None,
        api_key: str | None = None,
        *,
        settings: Settings | Mapping[str, Any] | None = None,
    ) -> None:
        """Raises UsageError, AuthenticationError, InitStartError (the embedded server does not start). Makes no request yet."""
        given = {"api_key": api_key} if api_key else {}
        self.settings = resolve(settings, {**(overrides or {}), **given})
        server = backend.server_for(self.settings)
        self.base_url = server.base_url
        self._connection = Connection(server.base_url, server.api_key, timeout=20.0 if timeout is None else timeout)
        self._entity = self.settings.entity

    @property
    def default_entity(self) -> str:
        """The configured entity, else the one of the API key."""
        if not self._entity:
            viewer = operations.read_viewer(self._connection.execute(operations.viewer()))
            if viewer is None:
                raise CommError(f"{self.base_url} does not know this API key; run `wbdist login`")
            self._entity = viewer.entity
        return self._entity

    def run(self, path: str) -> RunRecord:
        """The run at `entity/project/id` (also `project/id`, `id`, `entity/project:id`, `entity/project/runs/id`, or its URL).

        Raises RunNotFoundError.
        """
        entity, project, run_id = self._split(path)
        return RunRecord(self, entity, project, self.fetch(entity, project, run_id))

    def fetch(self, entity: str, project: str, run_id: str) -> RemoteRun:
        """One run as the server tells it. Raises RunNotFoundError."""
        found = reads.read_run(self.execute(reads.run(entity, project, run_id)))
        if found is None:
            raise RunNotFoundError(f"could not find run {entity}/{project}/{run_id} on {self.base_url}")
        return found

    def runs(
        self, path: str | None = None, filters: Mapping[str, Any] | None = None, order: str = "+created_at", per_page: int = 50
    ) -> Runs:
        """The runs of `entity/project` (or `project`), fetched a page at a time as they are looked at.

        `filters`: W&B's subset of MongoDB's language, e.g. {"group": "g1", "config.lr.value": {"$lt": 0.1}}. A project that
        does not exist has no runs. `order`: a field name behind `+` or `-`.
        """
        if per_page < 1:
            raise UsageError(f"per_page={per_page} must be at least 1")
        parts = [part for part in (path or "").split("/") if part]
        if len(parts) > 2:
            raise UsageError(f"path {path!r} must be `entity/project` or `project`")
        project = parts[-1] if parts else self.settings.project
        if not project:
            raise UsageError("runs() needs a project: a path `entity/project` or `project`, or WANDB_PROJECT")
        return Runs(
            self,
            parts[0] if len(parts) == 2 else self.default_entity,
            project,
            filters=dict(filters or {}),
            order=order,
            per_page=per_page,
        )

    def _split(self, path: str) -> tuple[str, str, str]:
        if "://" in path:
            path = urlsplit(path).path
        parts = [part for part in path.split("/") if part]
        if not (len(parts) >= 3 and _IMMUTABLE.fullmatch(parts[-1])):  # else the id of one incarnation
            parts = [part for part in path.replace(":", "/").split("/") if part]
        if len(parts) == 4 and parts[2] == "runs":
            del parts[2]
        if not 1 <= len(parts) <= 3:
            raise UsageError(f"run path {path!r} is not understood; write entity/project/id")
        project = parts[-2] if len(parts) > 1 else self.settings.project
        if not project:
            raise UsageError(f"run path {path!r} has no project, and none is set: write entity/project/id")
        return (parts[0] if len(parts) == 3 else self.default_entity), project, parts[-1]

    def execute(self, operation: operations.Operation) -> dict[str, Any]:
        """One GraphQL operation; for `RunRecord` and `Runs`."""
        return self._connection.execute(operation)


class RunRecord:
    """One run as the server had it when it was read; `load()` reads it again. History is read when asked for."""

    def __init__(self, api: Api, entity: str, project: str, found: RemoteRun) -> None:
        """Use `Api.run`."""
        self._api = api
        self.entity = entity
        self.project = project
        self._found = found

    def load(self) -> RunRecord:
        """Reads state, config and summary again; returns self. Raises RunNotFoundError when the run is gone."""
        self._found = self._api.fetch(self.entity, self.project, self.id)
        return self

    @property
    def id(self) -> str:
        return self._found.run_id

    @property
    def name(self) -> str:
        """Display name."""
        return self._found.display_name

    display_name = name

    @property
    def state(self) -> str:
        return self._found.state

    @property
    def config(self) -> dict[str, Any]:
        """Without keys that begin with `_`."""
        return {key: value for key, value in self._found.config.items() if not key.startswith("_")}

    @property
    def rawconfig(self) -> dict[str, Any]:
        return dict(self._found.raw_config)

    @property
    def summary(self) -> dict[str, Any]:
        return dict(self._found.summary)

    summary_metrics = summary

    @property
    def group(self) -> str:
        return self._found.group

    @property
    def job_type(self) -> str:
        return self._found.job_type

    @property
    def tags(self) -> list[str]:
        return list(self._found.tags)

    @property
    def notes(self) -> str:
        return self._found.notes

    @property
    def commit(self) -> str:
        return self._found.commit

    @property
    def created_at(self) -> str:
        """ISO 8601, UTC."""
        return self._found.created_at

    @property
    def heartbeat_at(self) -> str:
        """ISO 8601, UTC."""
        return self._found.heartbeat_at

    @property
    def storage_id(self) -> str:
        return self._found.storage_id

    @property
    def username(self) -> str:
        return self._found.username

    @property
    def lastHistoryStep(self) -> int:  # noqa: N802  (W&B's name)
        """-1 without history."""
        return self._found.last_step

    @property
    def path(self) -> list[str]:
        """[entity, project, id], as W&B has it."""
        return [self.entity, self.project, self.id]

    @property
    def url(self) -> str:
        return f"{self._api.base_url}/{quote(self.entity)}/{quote(self.project)}/runs/{quote(self.id)}"

    def attempts(self) -> list[RemoteAttempt]:
        """The run's attempts, oldest first; only a wbdist server has them (CommError elsewhere)."""
        return reads.read_attempts(self._api.execute(reads.attempts(*self._address)))

    def history(
        self,
        samples: int = 500,
        keys: Sequence[str] | None = None,
        x_axis: str = "_step",
        pandas: bool | None = None,
        stream: str = "default",
    ) -> Any:
        """At most `samples` rows, spread over the run; with `keys` those rows that have all of them.

        `pandas` None: a DataFrame when pandas is installed, else a list. `stream="system"`: system metrics.
        """
        if samples < 1:
            raise UsageError(f"samples={samples} must be at least 1")
        if stream not in {"default", "system"}:
            raise UsageError(f"stream={stream!r} is not one of: default, system")
        if keys is not None and stream == "system":
            raise UsageError("keys cannot be chosen with stream='system'")
        if keys:
            wanted = [x_axis, *(key for key in keys if key != x_axis)]
            sampled = reads.sampled_history(*self._address, keys=wanted, samples=samples)
            rows = reads.read_sampled_history(self._api.execute(sampled))
        else:
            full = reads.full_history(*self._address, samples, events=stream == "system")
            rows = reads.read_full_history(self._api.execute(full))
        return rows if pandas is False else _framed(rows, required=bool(pandas))

    def scan_history(
        self,
        keys: Sequence[str] | None = None,
        page_size: int = PAGE_STEPS,
        min_step: int | None = None,
        max_step: int | None = None,
        *,
        attempt: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Every row in order with min_step <= `_step` < max_step, a page at a time.

        With `keys` only rows that have all of them, and these keys alone. `attempt` (a wbdist server's) reads the history
        as that attempt saw it.
        """
        if page_size < 1:
            raise UsageError(f"page_size={page_size} must be at least 1")
        return self._scan(tuple(keys or ()), page_size, min_step or 0, max_step, attempt)

    def _scan(
        self, keys: tuple[str, ...], page_size: int, first: int, last: int | None, attempt: int | None
    ) -> Iterator[dict[str, Any]]:
        # An archived attempt may reach beyond the live history; then the end is where pages run dry.
        end = last if last is not None else (self.lastHistoryStep + 1 if attempt is None else None)
        while end is None or first < end:
            stop = first + page_size if end is None else min(first + page_size, end)
            page = reads.history_page(*self._address, first, stop, attempt=attempt)
            rows = reads.read_history_page(self._api.execute(page))
            if end is None and not rows:
                return
            for row in rows:
                if not keys:
                    yield row
                elif all(key in row for key in keys):
                    yield {key: row[key] for key in keys}
            first = stop

    @property
    def _address(self) -> tuple[str, str, str]:
        return self.entity, self.project, self.id

    def __repr__(self) -> str:
        return f"<Run {self.entity}/{self.project}/{self.id} ({self.state})>"


class Runs:
    """Runs of a project, in order, fetched a page at a time: iterable, indexable, with `len`."""

    def __init__(self, api: Api, entity: str, project: str, *, filters: dict[str, Any], order: str, per_page: int) -> None:
        """Use `Api.runs`."""
        self._api = api
        self.entity = entity
        self.project = project
        self._filters = filters
        self._order = order
        self._per_page = per_page
        self._found: list[RunRecord] = []
        self._cursor: str | None = None
        self._total: int | None = None
        self._complete = False

    def __len__(self) -> int:
        if self._total is None:
            self._fetch()
        return self._total or 0

    def __iter__(self) -> Iterator[RunRecord]:
        at = 0
        while True:
            if at < len(self._found):
                yield self._found[at]
                at += 1
            elif self._complete:
                return
            else:
                self._fetch()

    def __getitem__(self, index: int) -> RunRecord:
        """Fetches as far as needed. Raises IndexError."""
        while not self._complete and (index < 0 or index >= len(self._found)):
            self._fetch()
        return self._found[index]

    def _fetch(self) -> None:
        page = reads.read_runs(
            self._api.execute(
                reads.runs(
                    self.entity,
                    self.project,
                    filters=self._filters,
                    order=self._order,
                    cursor=self._cursor,
                    per_page=self._per_page,
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


def _framed(rows: list[dict[str, Any]], *, required: bool) -> Any:
    try:
        pandas = import_module("pandas")  # optional, and not ours to depend on
    except ImportError as error:
        if required:
            raise UsageError("history(pandas=True) needs pandas, which is not installed; leave it out to get a list") from error
        return rows
    return pandas.DataFrame.from_records(rows)
