"""`SqlStore`: runs, attempts and history in SQL tables. The contract is `interface.py`, the tables are `schema.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.position import HISTORY, RunPosition
from wbdist.core.states import RunEvent, RunState, next_state
from wbdist.errors import UsageError
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt
from wbdist.server.store import appending, attempts, branches, deleting, names, reading
from wbdist.server.store import opening as attempts_by_opening
from wbdist.server.store.artifacts import ArtifactTable
from wbdist.server.store.chunks import ColumnCache
from wbdist.server.store.engine import Connections
from wbdist.server.store.files import FileTable
from wbdist.server.store.interface import Appended, AttemptRow, Bucket, DeletedRunError, Opening, RunFields, RunRow
from wbdist.server.store.runrows import incarnation_row, new_run, run_row, to_columns
from wbdist.server.store.schema import projects, runs
from wbdist.server.store.views import View, view_of

_ENDINGS = {RunEvent.EXIT_ZERO, RunEvent.EXIT_NONZERO, RunEvent.LOST, RunEvent.SILENCE, RunEvent.KILL}

# Built once: putting a statement together takes SQLAlchemy longer than running it takes SQLite.
_THERE = runs.c.deleted_at.is_(None)
_BY_PK = (runs.c.pk == sa.bindparam("key")) & _THERE
_BY_NAME = sa.and_(*(runs.c[name] == sa.bindparam(name) for name in ("entity", "project", "run_id")), _THERE)
_RUN = sa.select(runs).where(_BY_PK)
_RUN_BY_NAME = sa.select(runs).where(_BY_NAME)
_CURRENT = sa.select(runs.c.attempt).where(_BY_PK)
_FOR_APPEND = sa.select(
    *(runs.c[name] for name in ("pk", "attempt", "line_counts", "last_step", "metrics", "summary", "summary_given"))
).where(_BY_PK)


class SqlStore:
    """A Store over one database. Thread-safe. Every call raises StoreError when the database fails; it then changed nothing."""

    def __init__(self, connections: Connections) -> None:
        self._db = connections
        self.files = FileTable(connections)
        self.artifacts = ArtifactTable(connections)
        self._cache = ColumnCache()

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    # Runs -----------------------------------------------------------------------------------------------

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
        with self._db.write() as db:
            named = (runs.c.entity == entity) & (runs.c.project == project) & (runs.c.run_id == run_id)
            found = db.execute(self._db.locked(sa.select(runs).where(named))).mappings().first()
            given = {k: v for k in RunFields.__struct_fields__ if (v := getattr(fields, k)) is not msgspec.UNSET}
            if found is None:
                number = self._count_run(db, entity, project, now)
                values = new_run(entity, project, run_id, now) | to_columns(given, {})
                if not values["display_name"]:
                    values["display_name"] = names.invent(run_id, number)
                inserted = self._db.insert(runs).values(**values).on_conflict_do_nothing().returning(runs.c.pk)
                if (pk := db.execute(inserted).scalar()) is not None:
                    return self._opened(db, pk, self._asked(db, pk, opening, inserted=True), now), True
                found = db.execute(self._db.locked(sa.select(runs).where(named))).mappings().one()
            if found["deleted_at"] is not None:
                raise DeletedRunError(f"run {entity}/{project}/{run_id} was previously created and deleted; use another id")
            config = json.loads(found["config"])
            asked = self._asked(db, found["pk"], opening)
            anew = asked is not None and opening is not None and opening.kind != "resume"
            beneath = None if anew else attempts.beneath_of(attempts.attempt_of(db, found["pk"], found["attempt"]))
            changes = to_columns(given, config, config if keep_config else beneath.config if beneath else ())
            if not changes.get("display_name", "x"):
                del changes["display_name"]
            db.execute(
                sa.update(runs).where(runs.c.pk == found["pk"]).values(**changes, heartbeat_at=now, version=runs.c.version + 1)
            )
            return self._opened(db, found["pk"], asked, now, before=found), False

    def open_run(self, pk: int, opening: Opening, now: float) -> RunRow:
        with self._db.write() as db:
            locked = self._locked(db, pk)
            return self._opened(db, pk, self._asked(db, pk, opening), now, before=locked)

    def _asked(self, db: sa.Connection, pk: int, opening: Opening | None, *, inserted: bool = False) -> BeginAttempt | None:
        """The attempt that W&B's client begins with these words; None when it begins none, as when they come again."""
        return None if opening is None else attempts_by_opening.request(db, self._row(db, pk), opening, inserted=inserted)

    def _opened(
        self, db: sa.Connection, pk: int, asked: BeginAttempt | None, now: float, *, before: sa.RowMapping | None = None
    ) -> RunRow:
        """The run after what W&B's client opened it with; `before`: its row before that, None for a new one. It is locked."""
        if asked is not None:
            self._begin(db, pk, asked, now, before=before)
        return run_row(self._row(db, pk))

    def _count_run(self, db: sa.Connection, entity: str, project: str, now: float) -> int:
        statement = self._db.insert(projects).values(entity=entity, project=project, created_at=now, runs=1)
        statement = statement.on_conflict_do_update(index_elements=["entity", "project"], set_={"runs": projects.c.runs + 1})
        db.execute(statement)
        where = (projects.c.entity == entity) & (projects.c.project == project)
        return int(db.execute(sa.select(projects.c.runs).where(where)).scalar_one())

    def get_run(self, entity: str, project: str, run_id: str) -> RunRow | None:
        return self._find(_RUN_BY_NAME, {"entity": entity, "project": project, "run_id": run_id})

    def get_run_by_pk(self, pk: int) -> RunRow | None:
        return self._find(_RUN, {"key": pk})

    def find_run(self, entity: str, project: str, name: str) -> RunRow | None:
        run_id, attempt = names.incarnation(name)
        with self._db.read() as db:
            found = db.execute(_RUN_BY_NAME, {"entity": entity, "project": project, "run_id": run_id}).mappings().first()
            if found is None or attempt is None:
                return None if found is None else run_row(found)
            if not branches.exists(db, found["pk"], attempt):
                return None
            return incarnation_row(db, found, attempt)

    def position(self, run: RunRow, *, step: int | None = None) -> RunPosition:
        with self._db.read() as db:
            row = self._row(db, run.pk)
            if run.view is None:
                return branches.position(db, row, row["attempt"], step, json.loads(row["summary"]))
            return branches.position(db, row, run.view, step, None)

    def lineage(self, run: RunRow) -> list[dict[str, Any]]:
        with self._db.read() as db:
            attempt = self._row(db, run.pk)["attempt"] if run.view is None else run.view
            return branches.lineage(db, run.pk, attempt)

    def _find(self, statement: sa.Select[Any], named: dict[str, Any]) -> RunRow | None:
        with self._db.read() as db:
            found = db.execute(statement, named).mappings().first()
        return None if found is None else run_row(found)

    def list_projects(self) -> list[dict[str, Any]]:
        count, latest = sa.func.count(), sa.func.max(runs.c.heartbeat_at)
        shown = (projects.c.entity, projects.c.project, projects.c.created_at)
        statement = (
            sa.select(*shown, count.label("runs"), latest.label("updated_at"))
            .join(runs, (runs.c.entity == projects.c.entity) & (runs.c.project == projects.c.project) & _THERE)
            .group_by(*shown)
            .order_by(latest.desc())
        )
        with self._db.read() as db:
            return [dict(row) for row in db.execute(statement).mappings()]

    def list_runs(self, entity: str, project: str, *, group: str | None = None, limit: int = 1000) -> list[RunRow]:
        statement = sa.select(runs).where((runs.c.entity == entity) & (runs.c.project == project) & _THERE)
        if group is not None:
            statement = statement.where(runs.c.run_group == group)
        with self._db.read() as db:
            found = db.execute(statement.order_by(runs.c.created_at.desc(), runs.c.pk.desc()).limit(limit)).mappings().all()
        return [run_row(row) for row in found]

    def silent_runs(self, before: float) -> list[int]:
        states = [RunState.RUNNING.value, RunState.PREEMPTING.value]
        statement = sa.select(runs.c.pk).where(runs.c.state.in_(states) & (runs.c.heartbeat_at < before) & _THERE)
        with self._db.read() as db:
            return list(db.execute(statement).scalars())

    def set_summary(
        self, pk: int, summary: dict[str, Any], now: float, *, attempt: int | None = None, merge: bool = False
    ) -> None:
        with self._db.write() as db:
            run = self._locked(db, pk)
            if attempt is not None and attempt != run["attempt"]:
                return
            stored = json.loads(run["summary"])
            if attempt is not None and attempts.is_shared(db, pk, attempt):
                rows = set(json.loads(run["metrics"]))
                given = {key: value for key, value in summary.items() if not key.startswith("_") and key not in rows}
                change = {"summary": json.dumps(stored | given), "heartbeat_at": now, "version": runs.c.version + 1}
                db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change))
                return
            steps = (summary.get("_step"), stored.get("_step"))
            behind = attempt is not None and all(type(step) is int for step in steps) and steps[0] < steps[1]
            if attempt is not None and (behind or run["summary_given"] or stored.keys() - summary.keys()):
                merge = attempts.has_several_writers(db, pk, attempt)
            if behind and not merge:
                return  # said before, and repeated
            if merge:  # of a writer from which another one has taken over, what that did not say itself counts
                summary = summary | stored if behind else stored | summary
            summary = attempts.laid_over(db, run, summary, whole=attempt is not None)
            change = {**to_columns({"summary": summary}, {}), "heartbeat_at": now, "version": runs.c.version + 1}
            db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change))

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
        with self._db.write() as db:
            run = self._locked(db, pk)
            cause = cause or event.value
            if attempt is not None and attempt < run["attempt"]:
                if event in _ENDINGS:
                    attempts.end(db, pk, attempt, attempts.when(ended, now), cause=cause, exit_code=exit_code)
                return run_row(run)
            state = next_state(RunState(run["state"]), event)
            change: dict[str, Any] = {"stopping": False} if run["stopping"] and event in {RunEvent.START, *_ENDINGS} else {}
            if event in {RunEvent.BEAT, RunEvent.START}:
                change["heartbeat_at"] = now
            if state != run["state"]:
                change |= {"state": state.value, "version": runs.c.version + 1}
            if change:
                db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change))
            if event is RunEvent.BEAT and "state" in change:
                attempts.reopen(db, pk, run["attempt"])
            if event in _ENDINGS and run["attempt"] > 0:
                guess = event is RunEvent.SILENCE
                attempts.end(
                    db, pk, run["attempt"], attempts.when(ended, now), cause=cause, exit_code=exit_code, only_open=guess
                )
            return run_row(self._locked(db, pk))

    def delete_run(self, pk: int, now: float) -> None:
        with self._db.write() as db:
            self._locked(db, pk)
            deleting.delete(db, pk, now)

    def ask_to_stop(self, pk: int) -> None:
        with self._db.write() as db:
            self._locked(db, pk)
            db.execute(sa.update(runs).where(runs.c.pk == pk).values(stopping=True, version=runs.c.version + 1))

    # Attempts -------------------------------------------------------------------------------------------

    def begin_attempt(self, pk: int, request: BeginAttempt, now: float) -> BegunAttempt:
        attempts.check(request)
        with self._db.write() as db:
            return self._begin(db, pk, request, now)

    def _begin(
        self, db: sa.Connection, pk: int, request: BeginAttempt, now: float, *, before: sa.RowMapping | None = None
    ) -> BegunAttempt:
        source = branches.find_source(db, self._row(db, pk), request)
        for key in sorted({pk, source.pk}):  # in one order, so that two that fork each other do not wait for ever
            self._locked(db, key)
        return attempts.begin(db, self._row(db, pk), source, request, now, before=before)

    def attempts(self, pk: int) -> list[AttemptRow]:
        with self._db.read() as db:
            current = self._current(db, pk)
            return [] if current is None else attempts.describe(db, pk, current, self._cache)

    # Lines ----------------------------------------------------------------------------------------------

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
        # Parsed and compressed before the transaction: other writers do not wait for that.
        ready = {stream: appending.Lines.of(stream, seq, texts) for stream, (seq, texts) in lines.items()}
        with self._db.write() as db:
            run = self._locked(db, pk, _FOR_APPEND)
            return appending.append(db, self._db.insert, run, ready, now, attempt=attempt, nonce=nonce, writer=writer)

    def history(
        self,
        pk: int,
        *,
        keys: Sequence[str] | None = None,
        min_step: int = 0,
        max_step: int | None = None,
        limit: int | None = None,
        attempt: int | None = None,
        stream: str = HISTORY,
        nonce: str | None = None,
    ) -> list[dict[str, Any]]:
        """As the contract; `nonce` (with `attempt`) reads what a rival of that attempt sent, which no view shows."""
        if nonce is not None and attempt is None:
            raise UsageError("nonce names a rival of an attempt: give attempt too")
        lane = None if nonce is None else nonce or appending.NO_NONCE
        with self._db.read() as db:
            view = self._view(db, pk, attempt, lane)
            if view is None:
                return []
            return reading.live_rows(
                db, view, stream, self._cache, keys=keys, min_step=min_step, max_step=max_step, limit=limit
            )

    def series(self, pk: int, key: str, *, buckets: int = 1000, attempt: int | None = None) -> list[Bucket]:
        return self.many_series(pk, [key], buckets=buckets, attempt=attempt).get(key, [])

    def many_series(
        self, pk: int, keys: Sequence[str], *, buckets: int = 1000, attempt: int | None = None
    ) -> dict[str, list[Bucket]]:
        if buckets < 1:
            raise UsageError(f"a chart needs at least 1 bucket, not {buckets}")
        with self._db.read() as db:
            view = self._view(db, pk, attempt)
            return {} if view is None else reading.series(db, view, keys, buckets)

    def history_tail(self, pk: int, stream: str, *, attempt: int | None = None) -> dict[str, Any] | None:
        with self._db.read() as db:
            view = self._view(db, pk, attempt)
            return None if view is None else reading.tail(db, view, stream)

    def console(self, pk: int, *, first: int = 0, limit: int = 1000, attempt: int | None = None) -> list[str]:
        with self._db.read() as db:
            view = self._view(db, pk, attempt)
            return [] if view is None else reading.console(db, view, first, limit)

    # ----------------------------------------------------------------------------------------------------

    def _view(self, db: sa.Connection, pk: int, attempt: int | None = None, lane: str | None = None) -> View | None:
        current = self._current(db, pk)
        return None if current is None else view_of(db, pk, current if attempt is None else attempt, lane)

    @staticmethod
    def _current(db: sa.Connection, pk: int) -> int | None:
        return db.execute(_CURRENT, {"key": pk}).scalar()

    def _locked(self, db: sa.Connection, pk: int, statement: sa.Select[Any] = _RUN) -> sa.RowMapping:
        return self._row(db, pk, self._db.locked(statement))

    @staticmethod
    def _row(db: sa.Connection, pk: int, statement: sa.Select[Any] = _RUN) -> sa.RowMapping:
        found = db.execute(statement, {"key": pk}).mappings().first()
        if found is None:
            raise UsageError(f"there is no run with the key {pk}")
        return found
