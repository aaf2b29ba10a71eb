"""What the pages show of runs: small JSON values made of the store's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from wbdist.core.attempts import describe_end
from wbdist.core.position import CONSOLE, HISTORY
from wbdist.protocol.jsonvalues import plain
from wbdist.server.store.alerts import Alert
from wbdist.server.store.interface import AttemptRow, Bucket, RunRow

_MAX_SUMMARY_KEYS = 100
"""Of one run in a table of runs; its own page shows all."""


def project(row: Mapping[str, Any]) -> dict[str, Any]:
    """A project as a card."""
    return {key: row[key] for key in ("entity", "project", "runs", "created_at", "updated_at")}


def table_row(run: RunRow) -> dict[str, Any]:
    """A run as a line of a table."""
    rank = _value(run.config.get("rank"))
    runtime = run.summary.get("_runtime")
    numbers = {key: value for key, value in run.summary.items() if not key.startswith("_") and _is_number(value)}
    return {
        "id": run.run_id,
        "name": run.display_name,
        "state": run.state.value,
        "group": run.group,
        "job_type": run.job_type,
        "sweep": run.sweep,
        "rank": plain(rank) if isinstance(rank, int) and not isinstance(rank, bool) else None,
        "tags": run.tags,
        "attempt": run.attempt,
        "last_step": run.last_step,
        "rows": run.line_counts.get(HISTORY, 0),
        "created_at": run.created_at,
        "heartbeat_at": run.heartbeat_at,
        "runtime": plain(runtime) if _is_number(runtime) else None,
        "version": run.version,
        "metrics": run.metrics,
        "summary": plain(dict(sorted(numbers.items())[:_MAX_SUMMARY_KEYS])),
    }


def run_page(run: RunRow, attempts: Sequence[AttemptRow], alerts: Sequence[Alert]) -> dict[str, Any]:
    """Everything of one run but its lines."""
    return {
        **table_row(run),
        "config": plain({key: _value(entry) for key, entry in sorted(run.config.items()) if key != "_wandb"}),
        "summary": plain({key: value for key, value in sorted(run.summary.items()) if key != "_wandb"}),
        "notes": run.notes,
        "host": run.host,
        "program": run.program,
        "commit": run.commit,
        "repo": run.repo,
        "console_lines": run.line_counts.get(CONSOLE, 0),
        "attempts": attempt_list(run.attempt, attempts),
        "alerts": [msgspec.structs.asdict(alert) for alert in alerts],
    }


def attempt_list(current: int, attempts: Sequence[AttemptRow]) -> list[dict[str, Any]]:
    """The attempts, each with `live`: whether the line that is shown passes through it; and `end`: how it ended, in a word."""
    bases = {row.attempt: row.base_attempt for row in attempts}
    live: set[int] = set()
    at: int | None = current
    while at is not None and at in bases and at not in live:
        live.add(at)
        at = bases[at]
    out = []
    for row in attempts:
        shown = msgspec.structs.asdict(row)
        del shown["nonce"]
        out.append({**shown, "live": row.attempt in live, "end": describe_end(row.end_cause, row.exit_code)})
    return out


def series(run_id: str, key: str, buckets: Sequence[Bucket]) -> dict[str, Any]:
    """One line of a chart, by columns. Where no bucket stands for several values, `min`, `max` and the like are left out.

    NaN and the infinities become null when this is encoded.
    """
    out: dict[str, Any] = {"run": run_id, "key": key, "lo": [b.lo for b in buckets], "mean": [b.mean for b in buckets]}
    if any(b.count > 1 for b in buckets):
        for field in ("hi", "count", "min", "max", "last"):
            out[field] = [getattr(b, field) for b in buckets]
    return out


def _value(entry: Any) -> Any:
    """W&B wraps config values: {"value": v}."""
    return entry["value"] if isinstance(entry, dict) and "value" in entry else entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
