"""Appending: which lines of a request are new, where they go, and what the run's row says afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from wbdist.core.position import CONSOLE, HISTORY, Watermark
from wbdist.server.store import lines as lining
from wbdist.server.store.attempts import attempt_of, has_several_writers
from wbdist.server.store.chunks import LOOSE, Key, compact, store
from wbdist.server.store.derived import in_summary, recount
from wbdist.server.store.forks import recount_forks
from wbdist.server.store.interface import Appended
from wbdist.server.store.lines import Batch
from wbdist.server.store.replays import Known
from wbdist.server.store.schema import console_lines, cursors, runs
from wbdist.server.store.views import view_of

Insert = Callable[[sa.Table], Any]
"""The dialect's INSERT, with ON CONFLICT."""

# Built once: putting a statement together takes SQLAlchemy longer than running it takes SQLite.
_CURSORS = sa.select(cursors.c.stream, cursors.c.next, cursors.c.loose).where(
    *(cursors.c[name] == sa.bindparam(name) for name in ("run_pk", "attempt", "lane", "writer"))
)


def _upsert_cursor(insert: Insert) -> Any:
    statement = insert(cursors)
    change = {name: statement.excluded[name] for name in ("next", "loose")}
    return statement.on_conflict_do_update(index_elements=list(Key.__struct_fields__), set_=change)


_CONFIG = sa.select(runs.c.config).where(runs.c.pk == sa.bindparam("key"))
_TOUCH_RUN = sa.update(runs).where(runs.c.pk == sa.bindparam("key"))
_CHANGE_RUN = _TOUCH_RUN.values(version=runs.c.version + 1)
_MOVE_CURSOR = {"sqlite": _upsert_cursor(sqlite.insert), "postgresql": _upsert_cursor(postgresql.insert)}

NO_NONCE = "(none)"
"""Lane of lines that name an attempt but no nonce."""


SDK = "sdk"
"""Writer of W&B's client, unless it is in shared mode."""


class Lines(msgspec.Struct, frozen=True):
    """Lines of one stream as a request brought them."""

    seq: int
    """As the client counts: seq in the attempt, or for the plain SDK the offset in the live view."""
    parsed: list[Any]
    batch: Batch | None
    """All of them, ready to be stored: the usual case is that all are new. None for the console."""

    @classmethod
    def of(cls, stream: str, seq: int, texts: list[str]) -> Lines:
        """Raises ValueError for a line that is not what the stream holds."""
        if seq < 0:
            raise ValueError(f"{stream}: the first line's number must not be negative, and is {seq}")
        parsed = lining.parse(stream, texts)
        return cls(seq, parsed, Batch.of(parsed) if parsed and stream != CONSOLE else None)


def append(
    db: sa.Connection,
    insert: Insert,
    run: sa.RowMapping,
    lines: Mapping[str, Lines],
    now: float,
    *,
    attempt: int | None,
    nonce: str,
    writer: str,
) -> Appended:
    """See `Store.append`; `run` is locked by the caller."""
    pk, current = int(run["pk"]), int(run["attempt"])
    plain = attempt is None and writer == SDK
    target = current if attempt is None else attempt
    lane = ""
    if attempt is not None:
        known = attempt_of(db, pk, target)
        if known is None or known["nonce"] == "":
            return Appended(code="gap", next={}, attempt=current)
        lane = "" if known["nonce"] == nonce else nonce or NO_NONCE
    position, loose = _cursors(db, pk, target, lane, writer)
    next_seq = {stream: position.get(stream, 0) for stream in lines}
    # W&B's client counts lines of the run, but where several write to one (shared mode) each counts its own.
    view = view_of(db, pk, target) if plain else None
    below = {stream: 0 if view is None else view.below(stream, target) for stream in lines}
    if view is not None:
        known_lines = Known(view, run["last_step"])
        ends = {stream: below[stream] + next_seq[stream] for stream in lines}
        lines = {stream: _unrepeated(db, known_lines, stream, part, ends[stream]) for stream, part in lines.items()}
    if any(part.seq - below[stream] > next_seq[stream] for stream, part in lines.items()):
        return Appended(code="gap", next=next_seq, attempt=current)
    fresh: dict[str, Batch | None] = {}
    for stream, part in lines.items():
        first = part.seq - below[stream]
        # W&B's client rewrites console lines: progress bars.
        start = max(first, 0) if attempt is None and stream == CONSOLE else max(first, next_seq[stream])
        rows = part.parsed[start - first :]
        if not rows:
            continue
        key = Key(pk, target, lane, stream, writer)
        if stream == CONSOLE:
            _write_console(db, insert, key, start, rows)
            fresh[stream] = None
        else:
            batch = part.batch if part.batch is not None and start == first else Batch.of(rows)
            fresh[stream] = batch
            loose[stream] = loose.get(stream, 0) + store(db, key, start, batch)
            if loose[stream] >= LOOSE:
                compact(db, key)
                loose[stream] = 0
        next_seq[stream] = max(next_seq[stream], start + len(rows))
        moved = {"next": next_seq[stream], "loose": loose.get(stream, 0)}
        db.execute(_MOVE_CURSOR[db.dialect.name], msgspec.structs.asdict(key) | moved)
    fenced = bool(lane)
    change: dict[str, Any] = {}
    if not lane and target == current:
        change = _advance(db, run, position, next_seq, fresh)
        history = fresh.get(HISTORY)
        if history is not None and run["summary_given"] and attempt is not None and _is_part(db, pk, target, writer):
            change["summary"] = json.dumps(_with_latest(db, run, history))
    elif not lane:  # a rival's lines are part of no view
        view = view_of(db, pk, current)
        fenced = not view.admits(target, writer, next_seq)
        if fresh:
            change = recount(db, view, config=None if run["summary_given"] else config_of(db, pk))
            if change.pop("summary_given", None) is not None:
                change["summary"] = json.dumps(_by_hand(run) | json.loads(change["summary"]))
    if fresh and not lane:
        recount_forks(db, pk, lambda base: _shows(base, target, writer, position, fresh))
    if target == current and not lane:  # what a superseded attempt says is no sign of life of the run
        change["heartbeat_at"] = now
    if change or fresh:
        db.execute(_CHANGE_RUN if fresh else _TOUCH_RUN, {"key": pk, **change})
    return Appended(code="fenced" if fenced else "", next=next_seq, attempt=current, rival=bool(lane))


def _advance(
    db: sa.Connection,
    run: sa.RowMapping,
    before: Mapping[str, int],
    after: Mapping[str, int],
    fresh: Mapping[str, Batch | None],
) -> dict[str, Any]:
    """The run's row after lines of the current attempt, all of which are live: mostly no need to look at what lies there."""
    if not fresh:
        return {}
    counts: dict[str, int] = json.loads(run["line_counts"])
    for stream in fresh:
        counts[stream] = counts.get(stream, 0) + after[stream] - before.get(stream, 0)
    change: dict[str, Any] = {"line_counts": json.dumps(counts)}
    batch = fresh.get(HISTORY)
    if batch is not None:
        if batch.step_hi > run["last_step"]:
            change["last_step"] = batch.step_hi
        known = set(json.loads(run["metrics"]))
        if not batch.numeric <= known:
            change["metrics"] = json.dumps(sorted(known | batch.numeric))
        if not run["summary_given"]:
            change["summary"] = json.dumps(_with_latest(db, run, batch))
    return change


def _with_latest(db: sa.Connection, run: sa.RowMapping, batch: Batch) -> dict[str, Any]:
    """The run's summary after rows of the current attempt."""
    latest = {key: value for row in batch.rows for key, value in row.items() if value is not None}
    shown = {key: value for key, value in latest.items() if in_summary(key)}
    old = json.loads(run["summary"])
    if batch.step_lo > run["last_step"] and not any(_reduced(old.get(key), new) for key, new in shown.items()):
        return {**old, **shown}
    # Of several writers the last value is a matter of steps, not of arrival; or more than the last is asked for.
    view = view_of(db, int(run["pk"]), int(run["attempt"]))
    made: dict[str, Any] = json.loads(recount(db, view, config=config_of(db, int(run["pk"])))["summary"])
    if run["summary_given"]:  # of the keys that these rows do not have, the client knows more
        return {**old, **{key: made[key] for key in shown if key in made}}
    return _by_hand(run) | made


def _by_hand(run: sa.RowMapping) -> dict[str, Any]:
    """What no row has of a summary that the server makes of rows: a writer of a shared run has set it."""
    rows = set(json.loads(run["metrics"]))
    return {key: value for key, value in json.loads(run["summary"]).items() if not key.startswith("_") and key not in rows}


def _is_part(db: sa.Connection, pk: int, attempt: int, writer: str) -> bool:
    """Whether these rows are in no summary that a client gives: a pool's worker logs them into its parent's run, and the parent
    knows its own rows alone."""
    return not writer.startswith("rank0") and has_several_writers(db, pk, attempt)


def _unrepeated(db: sa.Connection, known: Known, stream: str, part: Lines, expected: int) -> Lines:
    """The lines without those at their head that the run has; the others follow what it has then."""
    skip = known.repeated(db, stream, part.parsed)
    if skip == 0:
        return part
    rest = part.parsed[skip:]
    return Lines(expected, rest, Batch.of(rest) if rest and stream != CONSOLE else None)


def _shows(base: Watermark, attempt: int, writer: str, before: Mapping[str, int], fresh: Iterable[str]) -> bool:
    """Whether a fork on `base` shows lines that have just come."""
    if base.attempt != attempt:
        return base.attempt > attempt
    return any(base.counts.get(stream, {}).get(writer, 0) > before.get(stream, 0) for stream in fresh)


def _reduced(old: Any, new: Any) -> bool:
    """Whether the summary has more of a key than its last value: `define_metric` asked for it."""
    return isinstance(old, dict) and not isinstance(new, dict)


def config_of(db: sa.Connection, pk: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(db.execute(_CONFIG, {"key": pk}).scalar_one())
    return found


def _cursors(db: sa.Connection, pk: int, attempt: int, lane: str, writer: str) -> tuple[dict[str, int], dict[str, int]]:
    """stream -> next seq, and -> how near its next merge is, of one writer."""
    found = db.execute(_CURSORS, {"run_pk": pk, "attempt": attempt, "lane": lane, "writer": writer}).all()
    return {row.stream: row.next for row in found}, {row.stream: row.loose for row in found}


def _write_console(db: sa.Connection, insert: Insert, key: Key, first: int, texts: list[str]) -> None:
    where = {"run_pk": key.run_pk, "attempt": key.attempt, "lane": key.lane, "writer": key.writer}
    statement = insert(console_lines)
    statement = statement.on_conflict_do_update(index_elements=[*where, "seq"], set_={"line": statement.excluded.line})
    db.execute(statement, [{**where, "seq": first + i, "line": text} for i, text in enumerate(texts)])
