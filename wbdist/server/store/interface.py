"""What the app may ask of the store. Times are Unix seconds (float, UTC) and always passed in: the store has no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from wbdist.core.position import Counts, RunPosition
from wbdist.core.states import RunEvent, RunState
from wbdist.errors import UsageError
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt

if TYPE_CHECKING:
    from wbdist.server.store.artifacts import ArtifactTable
    from wbdist.server.store.files import FileTable


class UnknownRunError(UsageError):
    """A run that was named to build on does not exist."""


class BranchError(UsageError):
    """An attempt cannot be built where it was asked to be: the source has no such step, or would be based on itself."""


class DeletedRunError(UsageError):
    """The id belonged to a run that was deleted; ids are not used twice."""


class RunFields(msgspec.Struct, kw_only=True):
    """What an upsert may set; UNSET leaves the stored value as it is."""

    display_name: str | msgspec.UnsetType = msgspec.UNSET
    config: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """W&B form: {key: {"value": v}}; merged under `_wandb.e`, replaced elsewhere."""
    summary: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    group: str | msgspec.UnsetType = msgspec.UNSET
    job_type: str | msgspec.UnsetType = msgspec.UNSET
    notes: str | msgspec.UnsetType = msgspec.UNSET
    tags: list[str] | msgspec.UnsetType = msgspec.UNSET
    host: str | msgspec.UnsetType = msgspec.UNSET
    program: str | msgspec.UnsetType = msgspec.UNSET
    commit: str | msgspec.UnsetType = msgspec.UNSET
    repo: str | msgspec.UnsetType = msgspec.UNSET
    sweep: str | msgspec.UnsetType = msgspec.UNSET


class Opening(msgspec.Struct, frozen=True):
    """How a process of W&B's own client opens a run."""

    kind: str
    """`start` (by its id, without `resume`), `resume`, `rewind`, `fork`."""
    source: str = ""
    """Of a fork: the run id or immutable id it builds on."""
    step: int | None = None
    """Of a rewind or fork: the last step to keep."""


class RunRow(msgspec.Struct, kw_only=True):
    """One run as stored. `pk` is the store's key; `storage_id` the W&B storage id made of it."""

    pk: int
    storage_id: str
    entity: str
    project: str
    run_id: str
    display_name: str
    state: RunState
    config: dict[str, Any]
    summary: dict[str, Any]
    group: str
    job_type: str
    notes: str
    tags: list[str]
    host: str
    program: str
    commit: str
    repo: str
    sweep: str
    """The sweep, of whatever server, that the run is a trial of; ''."""
    created_at: float
    heartbeat_at: float
    attempt: int
    """Current attempt; 0 when no attempt was ever begun (a run of the plain wandb SDK)."""
    line_counts: dict[str, int]
    """stream -> live lines."""
    last_step: int
    """Last live `_step`, -1 when none."""
    metrics: list[str]
    """Names of the numeric history columns of the live view, sorted, without those starting with '_'."""
    stopping: bool = False
    """Somebody asked its process to stop; until it ends or is opened again."""
    version: int
    """Grows with every change of this run: a cheap 'has anything changed' for live pages."""
    view: int | None = None
    """The attempt that an immutable id `<run>:<attempt>` asked for, which `run_id` then is; None: the run as it is now."""


class AttemptRow(msgspec.Struct, kw_only=True):
    attempt: int
    nonce: str
    base_attempt: int | None
    base_step: int
    """Watermark step it was built on; -1 for a start from nothing."""
    started_at: float
    ended_at: float | None
    cause: str
    """Why it began."""
    end_cause: str
    """'' while it runs; 'exit', 'lost', 'preempted'; 'silence' and 'superseded' are guesses, which a later word corrects."""
    exit_code: int | None
    rows: int
    """History lines ever written in it."""
    rows_live: int
    """History lines of it that are visible now."""
    lost_seconds: float
    """Training in vain: as its marks tell, else run time between its last visible row, or its base, and its last row; 0 when
    all are visible."""
    phases: dict[str, float] | None = None
    """Where its wall-clock time went (`core.goodput.PHASES`); None for a run that no job has written."""


class Appended(msgspec.Struct, kw_only=True):
    """Result of `append`: `code` is '' (stored or already known), 'gap' (nothing stored) or 'fenced' (archived)."""

    code: str = ""
    next: dict[str, int] = {}
    attempt: int = 0
    rival: bool = False
    """The nonce is not the attempt's: the lines are kept apart, and are not that attempt's."""


class Bucket(msgspec.Struct):
    """One pixel column of a chart: steps [lo, hi], over `count` values."""

    lo: int
    hi: int
    count: int
    min: float
    max: float
    mean: float
    last: float


class Store(Protocol):
    """Thread-safe, synchronous; every mutation is one transaction and idempotent."""

    @property
    def files(self) -> FileTable:
        """Versions of the runs' files."""
        ...

    @property
    def artifacts(self) -> ArtifactTable: ...

    def upsert_run(
        self,
        entity: str,
        project: str,
        run_id: str,
        fields: RunFields,
        now: float,
        *,
        opening: Opening | None = None,
        keep_config: bool = False,
    ) -> tuple[RunRow, bool]:
        """Creates or updates; the flag says whether it was inserted. Creates the project on demand. Applies E.START on
        creation (pending -> running); does not touch the state of a known run, unless by `opening` it begins an attempt, in
        the same transaction. `keep_config`: config keys that are not given stay. Raises DeletedRunError for an id that was
        used by a run which is deleted, and what begin_attempt raises."""
        ...

    def open_run(self, pk: int, opening: Opening, now: float) -> RunRow:
        """Begins the attempt that `opening` of a known run asks for, unless it is begun already."""
        ...

    def begin_attempt(self, pk: int, request: BeginAttempt, now: float) -> BegunAttempt:
        """Newer attempt than the current one: close the current, archive what is above the base, recompute summary,
        state -> running. Same attempt and nonce: no change, answer again. Else: accepted=False.

        The source of a fork keeps its lines, which the fork shows by reference. Raises UnknownRunError and BranchError for what
        cannot be built on; nothing is changed then."""
        ...

    def append(
        self,
        pk: int,
        lines: dict[str, tuple[int, list[str]]],
        now: float,
        *,
        attempt: int | None = None,
        nonce: str = "",
        writer: str = "sdk",
    ) -> Appended:
        """stream -> (seq of first line, lines). Known seqs are skipped, so repeating is a no-op; a gap in any stream
        stores nothing. attempt None (W&B's own client): the current attempt. Of the writer `sdk` the seq is the W&B offset
        then, and rows up to the last step are known, wherever they come; another writer (shared mode) counts its own lines."""
        ...

    def record_event(
        self,
        pk: int,
        event: RunEvent,
        now: float,
        *,
        attempt: int | None = None,
        exit_code: int | None = None,
        cause: str = "",
        ended: float = 0.0,
    ) -> RunRow:
        """Runs the state table; also closes the attempt on an ending event, as of `ended` when the client says when that was.
        Ignored when `attempt` is superseded."""
        ...

    def set_summary(
        self, pk: int, summary: dict[str, Any], now: float, *, attempt: int | None = None, merge: bool = False
    ) -> None:
        """Replaces it; `merge`: the keys that are given, as of one of several writers. After a rewind or fork what was there at
        the branch point stays under it. Of a shared run it is only laid over what the rows make, where no row has the key.
        Ignored when `attempt` is superseded."""
        ...

    def delete_run(self, pk: int, now: float) -> None:
        """It is gone for all readers and its id stays taken. Its lines stay as long as forks show them."""
        ...

    def ask_to_stop(self, pk: int) -> None:
        """Sets `stopping`."""
        ...

    def silent_runs(self, before: float) -> list[int]:
        """pks of running or preempting runs whose last beat is older than `before`."""
        ...

    def get_run(self, entity: str, project: str, run_id: str) -> RunRow | None: ...
    def find_run(self, entity: str, project: str, name: str) -> RunRow | None:
        """For reading: `name` is a run id, or an immutable id `<run>:<attempt>`, which names that attempt's view for ever."""
        ...

    def position(self, run: RunRow, *, step: int | None = None) -> RunPosition:
        """Where the live view (or the attempt of an immutable id) stands, cut after `step`, inclusive. Names the run that the
        watermark counts in. Raises BranchError for a step that is not there."""
        ...

    def lineage(self, run: RunRow) -> list[dict[str, Any]]:
        """[{run, attempt, step, kind}], newest first: what the newest attempt was built on, what that was, and so on."""
        ...

    def get_run_by_pk(self, pk: int) -> RunRow | None: ...
    def list_projects(self) -> list[dict[str, Any]]:
        """[{entity, project, runs, created_at, updated_at}], newest activity first."""
        ...

    def list_runs(self, entity: str, project: str, *, group: str | None = None, limit: int = 1000) -> list[RunRow]:
        """Newest first."""
        ...

    def attempts(self, pk: int) -> list[AttemptRow]: ...

    def history(
        self,
        pk: int,
        *,
        keys: Sequence[str] | None = None,
        min_step: int = 0,
        max_step: int | None = None,
        limit: int | None = None,
        attempt: int | None = None,
        stream: str = "wandb-history.jsonl",
    ) -> list[dict[str, Any]]:
        """Live rows in order, [min_step, max_step); `attempt` reads that attempt's view instead, also when archived.
        `keys`: only rows that have all of them."""
        ...

    def series(self, pk: int, key: str, *, buckets: int = 1000, attempt: int | None = None) -> list[Bucket]:
        """One metric of the live view, downsampled; one bucket a value when there are at most `buckets` values."""
        ...

    def many_series(
        self, pk: int, keys: Sequence[str], *, buckets: int = 1000, attempt: int | None = None
    ) -> dict[str, list[Bucket]]:
        """The same of many, in a fraction of the time; without those that have no numbers."""
        ...

    def console(self, pk: int, *, first: int = 0, limit: int = 1000, attempt: int | None = None) -> list[str]: ...

    def history_tail(self, pk: int, stream: str, *, attempt: int | None = None) -> dict[str, Any] | None:
        """Last live line of a stream."""
        ...

    def close(self) -> None: ...


LiveCounts = Counts
