"""A run between its interface forms and its row in `runs`.

JSON is written in ASCII with bare NaN and Infinity, by the standard library: every value that came in comes out again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from wbdist.core.states import RunEvent, RunState, next_state
from wbdist.server.store import names
from wbdist.server.store.attempts import attempt_of, frozen_of
from wbdist.server.store.derived import recount
from wbdist.server.store.interface import RunRow
from wbdist.server.store.merging import merged_config
from wbdist.server.store.views import view_of

_COLUMN = {"group": "run_group", "commit": "git_commit"}
"""interface field -> column, where SQL reserves the word"""


def new_run(entity: str, project: str, run_id: str, now: float) -> dict[str, Any]:
    texts = ("display_name", "run_group", "job_type", "notes", "host", "program", "git_commit", "repo", "sweep")
    state = next_state(RunState.PENDING, RunEvent.START)
    return {
        **dict.fromkeys(texts, ""),
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
        "summary_given": False,
        "deleted_at": None,
        "stopping": False,
    }


def to_columns(given: dict[str, Any], config: dict[str, Any], keep: Iterable[str] = ()) -> dict[str, Any]:
    """Given fields of an upsert as columns; `config` is the stored one, to merge into; `keep`: its keys that stay."""
    out: dict[str, Any] = {}
    for field, value in given.items():
        if field == "config":
            out["config"] = json.dumps(merged_config(config, value, keep))
        elif field in {"summary", "tags"}:
            out[field] = json.dumps(value)
            if field == "summary":
                out["summary_given"] = True
        else:
            out[_COLUMN.get(field, field)] = value
    return out


def incarnation_row(db: sa.Connection, row: sa.RowMapping, attempt: int) -> RunRow:
    """The run as one of its attempts shows it."""
    seen = recount(db, view_of(db, row["pk"], attempt), config=json.loads(row["config"]))
    found = run_row({**row, **seen, "run_id": f"{row['run_id']}:{attempt}", "attempt": attempt})
    frozen = frozen_of(attempt_of(db, row["pk"], attempt))
    if frozen is not None:
        found.config, found.summary, found.state = frozen.config, frozen.summary, RunState(frozen.state)
    elif attempt == row["attempt"]:
        found.summary = json.loads(row["summary"])
    found.view = attempt
    return found


def run_row(row: Mapping[Any, Any]) -> RunRow:
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
        sweep=row["sweep"],
        created_at=row["created_at"],
        heartbeat_at=row["heartbeat_at"],
        attempt=row["attempt"],
        line_counts=json.loads(row["line_counts"]),
        last_step=row["last_step"],
        metrics=json.loads(row["metrics"]),
        stopping=row["stopping"],
        version=row["version"],
    )
