"""`RunRecord`: one run as the server has it, to read and to change, with W&B's names."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import msgspec

from wbdist.core.goodput import Goodput, goodput
from wbdist.core.states import TERMINAL
from wbdist.errors import DeadlineError, UsageError
from wbdist.protocol import edits, reads
from wbdist.protocol.operations import Operation
from wbdist.protocol.reads import RemoteAlert, RemoteAttempt, RemoteRun
from wbdist.run.absent import MissingNameError
from wbdist.run.connection import RefusedError

if TYPE_CHECKING:
    from wbdist.run.files_api import File, Files
    from wbdist.run.reader import Api
    from wbdist.run.run_artifacts import RunArtifacts

PAGE_STEPS = 1000
"""Steps asked for at a time: what W&B's server answers at most."""
END_OF_STEPS = 2**53
"""No history goes beyond."""
POLL_SECONDS = 1.0

_NOT_HERE = {
    "download_history_exports": "history is not exported to parquet; read it with `scan_history()`",
    "beta_scan_history": "read it with `scan_history()`",
    **dict.fromkeys(("to_html", "display"), "open the page at `.url`"),
    **dict.fromkeys(("create", "load_full_data"), "make one with `Api().create_run()`, read it anew with `.load()`"),
    "json_config": "the config as it is stored is `.rawconfig`",
    "log_artifact": "log it from a run of a process: `init(...).log_artifact(...)`",
    "use_artifact": "read it with `Api().artifact(...)`, or use it in a run of a process",
}


class Summary(dict[str, Any]):
    """A run's summary; `update` writes it to the server."""

    def __init__(self, record: RunRecord, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._record = record

    def update(self, *others: Any, **more: Any) -> None:
        """As a dict's, and the whole summary is then what the server has. Raises CommError."""
        super().update(*others, **more)
        self._record.send(edits.update_summary(self._record.storage_id, self))


class User(msgspec.Struct, frozen=True):
    """Whose run it is."""

    username: str
    name: str


class RunRecord:
    """One run as the server had it when it was read; `load()` reads it again. History is read when asked for.

    `name`, `notes`, `tags`, `group`, `job_type` and the items of `config` can be set; `update()` then writes them.
    """

    def __init__(self, api: Api, entity: str, project: str, found: RemoteRun) -> None:
        """Use `Api.run`."""
        self._api = api
        self.entity = entity
        self.project = project
        self._take(found)

    def _take(self, found: RemoteRun) -> None:
        self._found = found
        self._metadata: dict[str, Any] | None = None
        self.name = found.display_name
        """Display name."""
        self.notes = found.notes
        self.tags = list(found.tags)
        self.group = found.group
        self.job_type = found.job_type
        self.config = {key: value for key, value in found.config.items() if not key.startswith("_")}
        """Without keys that begin with `_`."""
        self.summary = Summary(self, found.summary)

    def load(self, force: bool = False) -> RunRecord:
        """Reads it all again, and forgets changes that `update()` has not written; returns self. Raises RunNotFoundError."""
        del force  # W&B's argument; here nothing is kept that could be stale
        self._take(self._api.fetch(self.entity, self.project, self.id))
        return self

    # Facts --------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self._found.run_id

    @property
    def display_name(self) -> str:
        return self.name

    @display_name.setter
    def display_name(self, value: str) -> None:
        self.name = value

    @property
    def state(self) -> str:
        return self._found.state

    @property
    def rawconfig(self) -> dict[str, Any]:
        """As stored, with W&B's own keys: {key: {"value": v}}."""
        return dict(self._found.raw_config)

    @property
    def summary_metrics(self) -> dict[str, Any]:
        return dict(self.summary)

    @property
    def system_metrics(self) -> dict[str, Any]:
        """The newest ones."""
        return dict(self._found.system_metrics)

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
    def user(self) -> User:
        return User(self._found.username, self._found.username)

    @property
    def sweep(self) -> None:
        """None: sweeps themselves are W&B's; `sweep_name` is the id of this run's."""

    @property
    def sweep_name(self) -> str | None:
        """The sweep that the run is a trial of; None of any other run."""
        return self._found.sweep or None

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

    def goodput(self) -> Goodput | None:
        """Where the job's wall-clock time went, over all attempts; None for a run that no job has written. Raises CommError."""
        return goodput(attempt.phases for attempt in self.attempts() if attempt.phases is not None)

    def lineage(self) -> list[edits.Ancestor]:
        """What this history was built on by resuming, forking and rewinding, newest first (W&B's page: "Forked From").

        Only a wbdist server has it (CommError elsewhere).
        """
        return edits.read_lineage(self._api.execute(edits.lineage(*self._address)))

    def alerts(self) -> list[RemoteAlert]:
        """What the run's `alert` calls said, oldest first; only a wbdist server has them (CommError elsewhere)."""
        return reads.read_alerts(self._api.execute(reads.alerts(*self._address)))

    # Changing it --------------------------------------------------------------------------------------

    def update(self) -> None:
        """Writes name, notes, tags, group, job type, config and summary as they are here. Raises CommError."""
        inner = {key: value for key, value in self._found.raw_config.items() if key.startswith("_")}
        self.send(
            edits.update_run(
                self.storage_id,
                config=inner | {key: {"value": value} for key, value in self.config.items()},
                display_name=self.name,
                notes=self.notes,
                tags=self.tags,
                group=self.group,
                job_type=self.job_type,
            )
        )
        if self.summary != self._found.summary:
            self.summary.update()

    save = update

    def delete(self, delete_artifacts: bool = False) -> None:
        """Deletes the run with its files; its id stays taken, and forks of it go on. Artifacts outlive their runs here.

        Raises CommError.
        """
        if delete_artifacts:
            raise UsageError("delete_artifacts=True: artifacts outlive their runs here; delete them one by one")
        self.send(edits.delete_run(self.storage_id))

    def stop(self) -> None:
        """Asks the run's process to stop; returns when the server has noted it. W&B's client then interrupts its script."""
        self.send(edits.stop_run(self.storage_id))

    def update_state(self, state: str) -> bool:
        """To `pending` (requeued) or to `failed` (given up); True when done. CommError when its state forbids it."""
        if state not in {"pending", "failed"}:
            raise UsageError(f"state={state!r} is not one of: pending, failed")
        done = self._api.execute(edits.update_state(self.storage_id, state))
        self.load()
        return bool((done.get("updateRunState") or {}).get("success"))

    def send(self, change: Operation) -> None:
        """One mutation of this run; for `Summary`."""
        self._api.execute(change)

    def wait_until_finished(self, timeout: float | None = None) -> None:
        """Returns when the run has ended, however it did: `state` then says how. Asks the server once a second.

        Raises DeadlineError when it is still going after `timeout` seconds (None: waits for as long as it takes).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.load().state not in TERMINAL:
            if deadline is not None and time.monotonic() > deadline:
                raise DeadlineError(f"run {'/'.join(self.path)} is still {self.state} after {timeout:g} s")
            time.sleep(POLL_SECONDS)

    # History ------------------------------------------------------------------------------------------

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
        return rows if pandas is False else framed(rows, required=bool(pandas))

    def scan_history(
        self,
        keys: Sequence[str] | None = None,
        page_size: int = PAGE_STEPS,
        min_step: int | None = None,
        max_step: int | None = None,
        use_cache: bool = True,
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
        # An archived attempt may reach beyond the live history.
        end = last if last is not None else self.lastHistoryStep + 1 if attempt is None else END_OF_STEPS
        width = page_size
        while first < end:
            stop = min(first + width, end)
            page = reads.history_page(*self._address, first, stop, rows=page_size, attempt=attempt)
            try:
                rows = reads.read_history_page(self._api.execute(page))
                whole = width <= page_size or len(rows) < page_size  # else W&B's server may have left some out
            except RefusedError:
                if width <= page_size:
                    raise
                whole = False  # more than ours gives at once
            if not whole:
                width = max(width // 8, page_size)
                continue
            for row in rows:
                if not keys:
                    yield row
                elif all(key in row for key in keys):
                    yield {key: row[key] for key in keys}
            first = stop
            if len(rows) < page_size // 8:  # steps that count samples or tokens lie far apart
                width *= 2

    def console_logs(self, *, per_page: int = 1000, last: int | None = None) -> Iterator[reads.ConsoleLine]:
        """What the run printed, line by line, oldest first, a page at a time; with `last` the newest lines only."""
        if per_page < 1 or (last is not None and last < 0):
            raise UsageError(f"per_page={per_page} must be at least 1 and last={last} not negative")
        return self._lines(per_page, last)

    def _lines(self, per_page: int, last: int | None) -> Iterator[reads.ConsoleLine]:
        cursor: str | None = None
        while True:
            page = reads.console_page(*self._address, first=per_page, after=cursor, last=last)
            lines, cursor = reads.read_console_lines(self._api.execute(page))
            yield from lines
            if cursor is None or last is not None:
                return

    # Files --------------------------------------------------------------------------------------------

    def files(self, names: list[str] | None = None, pattern: str | None = None, per_page: int = 50) -> Files:
        """The run's files by name, fetched a page at a time. `names`: these alone, also those that it has not (`md5` "0").
        `pattern`: SQL's LIKE, `%` for any text."""
        from wbdist.run.files_api import Files

        return Files(self._api, self._address, names, pattern, per_page)

    def file(self, name: str) -> File:
        """One file; its `md5` is "0" when the run has none of that name."""
        return self.files([name])[0]

    @property
    def metadata(self) -> dict[str, Any] | None:
        """How and on what the run ran: its file wandb-metadata.json, read once; None while there is none. Raises CommError."""
        if self._metadata is None and (file := self.file("wandb-metadata.json")).md5 != "0":
            with TemporaryDirectory(prefix="wbdist-") as folder, file.download(folder) as found:
                self._metadata = msgspec.json.decode(found.read(), type=dict[str, Any])
        return self._metadata

    def upload_file(self, path: str, root: str = ".") -> File:
        """Adds a local file to the run, named by its path below `root`. Blocks for the upload. Raises ValueError, CommError."""
        from wbdist.run import files_api

        return files_api.upload_file(self._api, self._address, path, root)

    def logged_artifacts(self, per_page: int = 100) -> RunArtifacts:
        """The artifacts that the run logged and still shows, fetched a page at a time as they are looked at."""
        from wbdist.run.run_artifacts import RunArtifacts

        return RunArtifacts(self._api, self._address, used=False, per_page=per_page)

    def used_artifacts(self, per_page: int = 100) -> RunArtifacts:
        """Those that it used."""
        from wbdist.run.run_artifacts import RunArtifacts

        return RunArtifacts(self._api, self._address, used=True, per_page=per_page)

    @property
    def _address(self) -> tuple[str, str, str]:
        return self.entity, self.project, self.id

    def __repr__(self) -> str:
        return f"<Run {self.entity}/{self.project}/{self.id} ({self.state})>"

    if not TYPE_CHECKING:  # a type checker is to find misspelt names

        def __getattr__(self, name: str) -> NoReturn:
            if name in _NOT_HERE:
                raise MissingNameError(f"a run read by wbdist has no `{name}`: {_NOT_HERE[name]}")
            raise AttributeError(f"a run read by wbdist has no attribute {name!r}")


def framed(rows: list[dict[str, Any]], *, required: bool) -> Any:
    """A pandas DataFrame; without pandas the rows themselves, or UsageError when it is required."""
    try:
        pandas = import_module("pandas")  # optional, and not ours to depend on
    except ImportError as error:
        if required:
            raise UsageError("history(pandas=True) needs pandas, which is not installed; leave it out to get a list") from error
        return rows
    return pandas.DataFrame.from_records(rows)
