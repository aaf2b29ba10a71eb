"""`SqlStore`: runs, attempts and history in SQL tables. The contract is `interface.py`, the tables are `schema.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect

from wbdist.core.position import CONSOLE, HISTORY, STREAMS, Watermark
from wbdist.core.states import RunEvent, RunState, next_state
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt
from wbdist.protocol.jsonvalues import dumps
from wbdist.server.store import lines as lining
from wbdist.server.store import names
from wbdist.server.store.engine import Connections
from wbdist.server.store.interface import Appended, AttemptRow, Bucket, RunFields, RunRow
from wbdist.server.store.schema import attempts, console_lines, cursors, projects, runs
from wbdist.server.store.views import View, live_columns, live_rows, recount, tail, view_of

_ENDINGS = {RunEvent.EXIT_ZERO, RunEvent.EXIT_NONZERO, RunEvent.LOST, RunEvent.SILENCE, RunEvent.KILL}
_COLUMN = {"group": "run_group", "commit": "git_commit"}
"""interface field -> column, where SQL reserves the word"""


class SqlStore:
    """A Store over one database. Thread-safe."""

    def __init__(self, connections: Connections) -> None:
        self._db = connections

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    # Runs -----------------------------------------------------------------------------------------------

    def upsert_run(self, entity: str, project: str, run_id: str, fields: RunFields, now: float) -> tuple[RunRow, bool]:
        with self._db.write() as db:
            where = (runs.c.entity == entity) & (runs.c.project == project) & (runs.c.run_id == run_id)
            found = db.execute(self._locked(sa.select(runs).where(where))).mappings().first()
            given = {k: v for k in RunFields.__struct_fields__ if (v := getattr(fields, k)) is not msgspec.UNSET}
            if found is None:
                number = self._count_run(db, entity, project, now)
                values = _new_run(entity, project, run_id, now) | _to_columns(given, {})
                if not values["display_name"]:
                    values["display_name"] = names.invent(run_id, number)
                inserted = self._insert(runs).values(**values).on_conflict_do_nothing()
                if db.execute(inserted).rowcount:
                    return _run_row(db.execute(sa.select(runs).where(where)).mappings().one()), True
                found = db.execute(self._locked(sa.select(runs).where(where))).mappings().one()
            changes = _to_columns(given, json.loads(found["config"]))
            if not changes.get("display_name", "x"):
                del changes["display_name"]
            db.execute(
                sa.update(runs).where(runs.c.pk == found["pk"]).values(**changes, heartbeat_at=now, version=runs.c.version + 1)
            )
            return _run_row(db.execute(sa.select(runs).where(where)).mappings().one()), False

    def _count_run(self, db: sa.Connection, entity: str, project: str, now: float) -> int:
        statement = self._insert(projects).values(entity=entity, project=project, created_at=now, runs=1)
        statement = statement.on_conflict_do_update(index_elements=["entity", "project"], set_={"runs": projects.c.runs + 1})
        db.execute(statement)
        where = (projects.c.entity == entity) & (projects.c.project == project)
        return int(db.execute(sa.select(projects.c.runs).where(where)).scalar_one())

    def get_run(self, entity: str, project: str, run_id: str) -> RunRow | None:
        where = (runs.c.entity == entity) & (runs.c.project == project) & (runs.c.run_id == run_id)
        with self._db.read() as db:
            found = db.execute(sa.select(runs).where(where)).mappings().first()
        return None if found is None else _run_row(found)

    def get_run_by_pk(self, pk: int) -> RunRow | None:
        with self._db.read() as db:
            found = db.execute(sa.select(runs).where(runs.c.pk == pk)).mappings().first()
        return None if found is None else _run_row(found)

    def list_projects(self) -> list[dict[str, Any]]:
        count, latest = sa.func.count(), sa.func.max(runs.c.heartbeat_at)
        statement = (
            sa.select(
                projects.c.entity, projects.c.project, projects.c.created_at, count.label("runs"), latest.label("updated_at")
            )
            .join(runs, (runs.c.entity == projects.c.entity) & (runs.c.project == projects.c.project))
            .group_by(projects.c.entity, projects.c.project, projects.c.created_at)
            .order_by(latest.desc())
        )
        with self._db.read() as db:
            return [dict(row) for row in db.execute(statement).mappings()]

    def list_runs(self, entity: str, project: str, *, group: str | None = None, limit: int = 1000) -> list[RunRow]:
        statement = sa.select(runs).where((runs.c.entity == entity) & (runs.c.project == project))
        if group is not None:
            statement = statement.where(runs.c.run_group == group)
        with self._db.read() as db:
            found = db.execute(statement.order_by(runs.c.created_at.desc(), runs.c.pk.desc()).limit(limit)).mappings().all()
        return [_run_row(row) for row in found]

    def silent_runs(self, before: float) -> list[int]:
        states = [RunState.RUNNING, RunState.PREEMPTING]
        statement = sa.select(runs.c.pk).where(runs.c.state.in_(states) & (runs.c.heartbeat_at < before))
        with self._db.read() as db:
            return list(db.execute(statement).scalars())

    def set_summary(self, pk: int, summary: dict[str, Any], now: float, *, attempt: int | None = None) -> None:
        with self._db.write() as db:
            run = self._locked_run(db, pk)
            if attempt is not None and attempt != run["attempt"]:
                return
            change = {"summary": dumps(summary), "heartbeat_at": now, "version": runs.c.version + 1}
            db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change))

    def record_event(
        self, pk: int, event: RunEvent, now: float, *, attempt: int | None = None, exit_code: int | None = None, cause: str = ""
    ) -> RunRow:
        with self._db.write() as db:
            run = self._locked_run(db, pk)
            if attempt is not None and attempt < run["attempt"]:
                self._end_attempt(db, pk, attempt, now, cause or event.value, exit_code, only_open=False)
                return _run_row(run)
            state = next_state(RunState(run["state"]), event)
            change: dict[str, Any] = {}
            if event is RunEvent.BEAT or event is RunEvent.START:
                change["heartbeat_at"] = now
            if state != run["state"]:
                change |= {"state": state.value, "version": runs.c.version + 1}
            if change:
                db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change))
            if event in _ENDINGS and run["attempt"] > 0:
                self._end_attempt(
                    db, pk, run["attempt"], now, cause or event.value, exit_code, only_open=event is RunEvent.SILENCE
                )
            return _run_row(self._locked_run(db, pk))

    @staticmethod
    def _end_attempt(  # noqa: PLR0917
        db: sa.Connection, pk: int, attempt: int, now: float, cause: str, exit_code: int | None, *, only_open: bool
    ) -> None:
        where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt)
        if only_open:
            where &= attempts.c.ended_at.is_(None)
        else:
            where &= attempts.c.end_cause.in_(["", "superseded", "silence"])  # a later word says more than a guess
        db.execute(sa.update(attempts).where(where).values(ended_at=now, end_cause=cause, exit_code=exit_code))

    # Attempts -------------------------------------------------------------------------------------------

    def begin_attempt(self, pk: int, request: BeginAttempt, now: float) -> BegunAttempt:
        with self._db.write() as db:
            run = self._locked_run(db, pk)
            current = int(run["attempt"])
            known = self._attempt(db, pk, request.attempt)
            if known is not None and known["nonce"] not in {"", request.nonce}:
                return BegunAttempt(accepted=False, attempt=current)
            base = None if request.base is None else msgspec.json.encode(request.base).decode()
            values = {"nonce": request.nonce, "base": base, "started_at": now, "cause": request.cause}
            fresh = known is None or known["nonce"] == ""
            if known is None:
                blank = {"run_pk": pk, "attempt": request.attempt, "end_cause": ""}
                db.execute(sa.insert(attempts).values(**blank, **values))
            elif fresh:
                where = (attempts.c.run_pk == pk) & (attempts.c.attempt == request.attempt)
                db.execute(sa.update(attempts).where(where).values(**values))
            if fresh and request.base is not None:
                self._make_placeholder(db, pk, request.base.attempt, now)
            if request.attempt > current:
                current = request.attempt
                open_ones = (attempts.c.run_pk == pk) & (attempts.c.attempt < current) & attempts.c.ended_at.is_(None)
                db.execute(sa.update(attempts).where(open_ones).values(ended_at=now, end_cause="superseded"))
                state = next_state(RunState(run["state"]), RunEvent.START)
                change = {"attempt": current, "state": state.value, "heartbeat_at": now}
                db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change))
            elif fresh:
                # An older attempt whose word comes late: what it wrote below the newer one's base still counts.
                where = (attempts.c.run_pk == pk) & (attempts.c.attempt == request.attempt)
                db.execute(sa.update(attempts).where(where).values(ended_at=now, end_cause="superseded"))
            view = view_of(db, pk, current)
            if fresh:
                recount(db, pk, view, summary=True)
            accepted = request.attempt == current or any(s.attempt == request.attempt for s in view.segments)
            return BegunAttempt(
                accepted=accepted,
                attempt=current,
                next=_next(db, pk, request.attempt),
                lines=_lines_below(view, request.attempt),
            )

    @staticmethod
    def _make_placeholder(db: sa.Connection, pk: int, attempt: int, now: float) -> None:
        """The server was away in that attempt; its lines may still come, from its journal."""
        where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt)
        if db.execute(sa.select(attempts.c.attempt).where(where)).first() is None:
            values = {"run_pk": pk, "attempt": attempt, "nonce": "", "base": None, "started_at": now, "cause": ""}
            db.execute(sa.insert(attempts).values(**values, ended_at=now, end_cause="superseded"))

    @staticmethod
    def _attempt(db: sa.Connection, pk: int, attempt: int) -> sa.RowMapping | None:
        where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt)
        return db.execute(sa.select(attempts).where(where)).mappings().first()

    def attempts(self, pk: int) -> list[AttemptRow]:
        with self._db.read() as db:
            current = db.execute(sa.select(runs.c.attempt).where(runs.c.pk == pk)).scalar()
            if current is None:
                return []
            view = view_of(db, pk, current)
            found = db.execute(sa.select(attempts).where(attempts.c.run_pk == pk).order_by(attempts.c.attempt)).mappings().all()
            out = []
            for row in found:
                base = None if row["base"] is None else msgspec.json.decode(row["base"], type=Watermark)
                out.append(
                    AttemptRow(
                        attempt=row["attempt"],
                        nonce=row["nonce"],
                        base_attempt=None if base is None else base.attempt,
                        base_step=-1 if base is None else base.step,
                        started_at=row["started_at"],
                        ended_at=row["ended_at"],
                        cause=row["cause"],
                        end_cause=row["end_cause"],
                        exit_code=row["exit_code"],
                        rows=view.written(HISTORY, row["attempt"]),
                        rows_live=view.live(HISTORY, row["attempt"]),
                    )
                )
            return out

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
        # Parsed before the transaction: other writers do not wait for JSON.
        parsed = {stream: lining.parse(stream, new) for stream, (_, new) in lines.items()}
        with self._db.write() as db:
            run = self._locked_run(db, pk)
            target = int(run["attempt"]) if attempt is None else attempt
            lane = ""
            if attempt is not None:
                known = self._attempt(db, pk, target)
                if known is None or known["nonce"] == "":
                    return Appended(code="gap", next={})
                lane = "" if known["nonce"] == nonce else nonce
            cursor = _next(db, pk, target, lane)
            position = {stream: cursor.get(stream, {}).get(writer, 0) for stream in lines}
            view = view_of(db, pk, int(run["attempt"]))
            starts = {}
            for stream, (seq, _) in lines.items():
                # A plain SDK's seq is its offset in the live view.
                start = seq if attempt is not None else max(0, seq - view.below(stream, target))
                if start > position[stream]:
                    return Appended(code="gap", next=position)
                starts[stream] = start
            changed = False
            for stream, batch in parsed.items():
                skip = position[stream] - starts[stream]
                rewrite = attempt is None and stream == CONSOLE
                fresh = batch if rewrite else batch[max(0, skip) :]
                if not fresh:
                    continue
                first = starts[stream] if rewrite else max(starts[stream], position[stream])
                key = lining.Key(pk, target, lane, stream, writer)
                lining.store(db, self._insert, key, first, fresh)
                position[stream] = max(position[stream], first + len(fresh))
                self._move_cursor(db, key, position[stream])
                changed = True
            if changed and not lane:
                recount(db, pk, view_of(db, pk, int(run["attempt"])), fresh=parsed)
            fenced = bool(lane) or (target < run["attempt"] and not _all_live(view, target, writer, position))
            beat = {} if fenced else {"heartbeat_at": now}
            if beat or changed:
                db.execute(
                    sa.update(runs).where(runs.c.pk == pk).values(**beat, version=runs.c.version + (1 if changed else 0))
                )
            return Appended(code="fenced" if fenced else "", next=position, attempt=int(run["attempt"]))

    def _move_cursor(self, db: sa.Connection, key: lining.Key, value: int) -> None:
        where = {"run_pk": key.run_pk, "attempt": key.attempt, "lane": key.lane, "stream": key.stream, "writer": key.writer}
        statement = self._insert(cursors).values(**where, next=value)
        db.execute(statement.on_conflict_do_update(index_elements=list(where), set_={"next": value}))

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
    ) -> list[dict[str, Any]]:
        with self._db.read() as db:
            view = self._view(db, pk, attempt)
            if view is None:
                return []
            return live_rows(db, view, stream, keys=keys, min_step=min_step, max_step=max_step, limit=limit)

    def series(self, pk: int, key: str, *, buckets: int = 1000) -> list[Bucket]:
        with self._db.read() as db:
            view = self._view(db, pk, None)
            return [] if view is None else lining.bucketed(*live_columns(db, view, key), buckets)

    def history_tail(self, pk: int, stream: str) -> dict[str, Any] | None:
        with self._db.read() as db:
            view = self._view(db, pk, None)
            return None if view is None else tail(db, view, stream)

    def console(self, pk: int, *, first: int = 0, limit: int = 1000) -> list[str]:
        with self._db.read() as db:
            view = self._view(db, pk, None)
            if view is None:
                return []
            parts = []
            for segment in view.segments:
                here = (
                    (console_lines.c.run_pk == pk) & (console_lines.c.attempt == segment.attempt) & (console_lines.c.lane == "")
                )
                if segment.limits is not None:
                    below = [
                        (console_lines.c.writer == writer) & (console_lines.c.seq < count)
                        for writer, count in segment.limits.get(CONSOLE, {}).items()
                    ]
                    here &= sa.or_(sa.false(), *below)
                parts.append(here)
            order = (console_lines.c.attempt, console_lines.c.writer, console_lines.c.seq)
            statement = sa.select(console_lines.c.line).where(sa.or_(*parts)).order_by(*order).offset(first).limit(limit)
            return list(db.execute(statement).scalars())

    def _view(self, db: sa.Connection, pk: int, attempt: int | None) -> View | None:
        current = db.execute(sa.select(runs.c.attempt).where(runs.c.pk == pk)).scalar()
        if current is None:
            return None
        return view_of(db, pk, current if attempt is None else attempt)

    # SQL that differs -----------------------------------------------------------------------------------

    def _insert(self, table: sa.Table) -> Any:
        return sqlite_dialect.insert(table) if self._db.sqlite else postgresql.insert(table)

    def _locked(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        return statement if self._db.sqlite else statement.with_for_update()

    def _locked_run(self, db: sa.Connection, pk: int) -> sa.RowMapping:
        return db.execute(self._locked(sa.select(runs).where(runs.c.pk == pk))).mappings().one()


def _next(db: sa.Connection, pk: int, attempt: int, lane: str = "") -> dict[str, dict[str, int]]:
    where = (cursors.c.run_pk == pk) & (cursors.c.attempt == attempt) & (cursors.c.lane == lane)
    out: dict[str, dict[str, int]] = {}
    for row in db.execute(sa.select(cursors.c.stream, cursors.c.writer, cursors.c.next).where(where)):
        out.setdefault(row.stream, {})[row.writer] = row.next
    return out


def _lines_below(view: View, attempt: int) -> dict[str, int]:
    return {stream: below for stream in STREAMS if (below := view.below(stream, attempt))}


def _all_live(view: View, attempt: int, writer: str, position: dict[str, int]) -> bool:
    segment = next((s for s in view.segments if s.attempt == attempt), None)
    return segment is not None and all(segment.admits(stream, writer, count - 1) for stream, count in position.items() if count)


def _new_run(entity: str, project: str, run_id: str, now: float) -> dict[str, Any]:
    texts = dict.fromkeys(("display_name", "run_group", "job_type", "notes", "host", "program", "git_commit", "repo"), "")
    state = next_state(RunState.PENDING, RunEvent.START)
    return {
        **texts,
        "entity": entity,
        "project": project,
        "run_id": run_id,
        "state": state.value,
        "config": "{}",
        "summary": "{}",
        "tags": "[]",
        "created_at": now,
        "heartbeat_at": now,
        "attempt": 0,
        "line_counts": "{}",
        "last_step": -1,
        "metrics": "[]",
        "version": 1,
    }


def _to_columns(given: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field, value in given.items():
        if field == "config":
            out["config"] = dumps(_merged_config(config, value))
        elif field in {"summary", "tags"}:
            out[field] = dumps(value)
        else:
            out[_COLUMN.get(field, field)] = value
    return out


def _merged_config(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """User keys are replaced as a whole; `_wandb` keeps one environment (`e`) per writer: they do not know each other's."""
    merged = dict(new)
    ours, theirs = (config.get("_wandb", {}).get("value") for config in (old, new))
    if isinstance(ours, dict):
        theirs = theirs if isinstance(theirs, dict) else {}
        value = {**ours, **theirs}
        if isinstance(ours.get("e"), dict) and isinstance(theirs.get("e"), dict):
            value["e"] = {**ours["e"], **theirs["e"]}
        merged["_wandb"] = {"value": value}
    return merged


def _run_row(row: sa.RowMapping) -> RunRow:
    return RunRow(
        pk=row["pk"],
        storage_id=names.storage_id(row["entity"], row["project"], row["run_id"]),
        entity=row["entity"],
        project=row["project"],
        run_id=row["run_id"],
        display_name=row["display_name"],
        state=RunState(row["state"]),
        config=json.loads(row["config"]),
        summary=json.loads(row["summary"]),
        group=row["run_group"],
        job_type=row["job_type"],
        notes=row["notes"],
        tags=json.loads(row["tags"]),
        host=row["host"],
        program=row["program"],
        commit=row["git_commit"],
        repo=row["repo"],
        created_at=row["created_at"],
        heartbeat_at=row["heartbeat_at"],
        attempt=row["attempt"],
        line_counts=json.loads(row["line_counts"]),
        last_step=row["last_step"],
        metrics=json.loads(row["metrics"]),
        version=row["version"],
    )
