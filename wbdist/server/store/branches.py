"""Where an attempt branches off: the cut through its own run's history or another's, resolved once, when it is begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa

from wbdist.core.attempts import Base, Segment
from wbdist.core.position import ALERTS, HISTORY, RunPosition, Watermark
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import filecuts, names
from wbdist.server.store.chunks import Chunk, load_many
from wbdist.server.store.columns import steps_of
from wbdist.server.store.derived import last_step, summary_of
from wbdist.server.store.interface import BranchError, UnknownRunError
from wbdist.server.store.schema import attempts, runs
from wbdist.server.store.views import View, chunks_of, cut_of, view_of


class Origin(msgspec.Struct, frozen=True):
    """What an attempt was built on as it was asked for; the cut itself may lie further down, in what that was built on."""

    run: int
    attempt: int
    step: int
    kind: str
    """`fork` (another run's), `rewind` (some streams start empty), `resume`."""
    asked: int | None = None
    """The step that was asked for; the run may have no row at it."""


class Beneath(msgspec.Struct, frozen=True):
    """What a rewind or fork has from before its branch point; what is given later is laid over it."""

    config: dict[str, Any]
    """Without `_wandb`."""
    summary: dict[str, Any]


class Frozen(msgspec.Struct, frozen=True):
    """What the run's row said when a newer attempt took over."""

    config: dict[str, Any]
    summary: dict[str, Any]
    state: str


class Source(msgspec.Struct, frozen=True):
    """The run that an attempt is to be built on, and in which attempt it is read."""

    pk: int
    attempt: int
    shown: str
    """As the caller named it."""


def find_source(db: sa.Connection, run: sa.RowMapping, request: BeginAttempt) -> Source:
    """The run of `base_run`, or this one below the attempt to be begun. Raises UnknownRunError."""
    if not request.base_run:
        below = sa.select(sa.func.max(attempts.c.attempt)).where(
            (attempts.c.run_pk == run["pk"]) & (attempts.c.attempt < request.attempt)
        )
        return Source(int(run["pk"]), int(db.execute(below).scalar() or 0), run["run_id"])
    run_id, number = names.incarnation(request.base_run)
    named = (runs.c.entity == run["entity"]) & (runs.c.project == run["project"]) & (runs.c.run_id == run_id)
    found = db.execute(sa.select(runs.c.pk, runs.c.attempt).where(named & runs.c.deleted_at.is_(None))).first()
    if found is None or (number is not None and not exists(db, found.pk, number)):
        asked = f"{run['entity']}/{run['project']}/{request.base_run}"
        raise UnknownRunError(f"run {asked} does not exist: nothing can be built on it")
    return Source(found.pk, found.attempt if number is None else number, request.base_run)


def exists(db: sa.Connection, pk: int, attempt: int) -> bool:
    """Whether a run has this attempt; 0 where W&B's own client wrote to it."""
    if attempt > 0:
        where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt) & (attempts.c.nonce != "")
        return db.execute(sa.select(attempts.c.attempt).where(where)).first() is not None
    view = view_of(db, pk, 0)
    return attempt == 0 and (bool(view.next_of(0)) or db.execute(_ATTEMPT, {"key": pk}).scalar() == 0)


_ATTEMPT = sa.select(runs.c.attempt).where(runs.c.pk == sa.bindparam("key"))


def resolve(db: sa.Connection, pk: int, source: Source, request: BeginAttempt) -> tuple[Base | None, Origin | None]:
    """What `request` of run `pk` builds on. Raises BranchError for a step that the source does not have."""
    if request.base is None and request.at_step is None and not request.base_run:
        return None, None
    kind = "fork" if source.pk != pk else "rewind" if request.at_step is not None or request.fresh else "resume"
    hidden = frozenset(request.fresh)
    if request.base is not None:
        base = Base(source.pk, filecuts.with_unstamped(db, source.pk, request.base), hidden)
        return base, Origin(source.pk, request.base.attempt, request.base.step, kind)
    view = view_of(db, source.pk, source.attempt)
    reached = last_step(db, view)
    if request.at_step is None:
        watermark = whole(view, source.attempt, reached)
        return Base(source.pk, watermark, hidden), Origin(source.pk, source.attempt, reached, kind)
    if not 0 <= request.at_step <= reached:
        has = f"its steps end at {reached}" if reached >= 0 else "it has none"
        raise BranchError(f"run {source.shown} has no step {request.at_step}: {has}; give one from 0 to its last")
    found = cut(db, view, request.at_step)
    origin = Origin(source.pk, source.attempt, found.watermark.step, kind, request.at_step)
    return msgspec.structs.replace(found, fresh=hidden), origin


def whole(view: View, attempt: int, step: int) -> Watermark:
    """Everything that an attempt shows now."""
    return Watermark(attempt, {stream: dict(by) for stream, by in view.next_of(attempt).items()}, step)


def cut(db: sa.Connection, view: View, step: int) -> Base:
    """The view up to `step`, inclusive: in the newest attempt that has such a row, of each writer what lies before its first
    row beyond, the alerts up to then, and the files and artifacts that had arrived by then. Its other streams have no steps:
    they come along where no row of that attempt is cut away."""
    for segment in reversed(view.segments):
        have = view.visible(segment, HISTORY)
        counts = _until(db, view, segment, HISTORY, step)
        if not any(counts.values()):
            continue
        others = (
            [stream for stream in view.streams() if stream not in {HISTORY, ALERTS, *filecuts.TABLES}] if counts == have else []
        )
        everything = {stream: view.visible(segment, stream) for stream in others}
        kept = {stream: by for stream, by in everything.items() if by} | {HISTORY: {w: n for w, n in counts.items() if n}}
        if alerts := {w: n for w, n in _until(db, view, segment, ALERTS, step).items() if n}:
            kept[ALERTS] = alerts
        kept |= filecuts.cut(db, view, segment.run, segment.attempt, step)
        watermark = Watermark(segment.attempt, kept)
        reached = last_step(db, cut_of(db, Base(segment.run, watermark)))
        return Base(segment.run, msgspec.structs.replace(watermark, step=reached))
    oldest = view.segments[0]
    return Base(oldest.run, Watermark(oldest.attempt, {}))


def _until(db: sa.Connection, view: View, segment: Segment, stream: str, step: int) -> dict[str, int]:
    """writer -> how many of its visible lines lie before its first beyond `step`."""
    found = chunks_of(db, view, segment, stream)
    return {
        writer: _first_beyond(db, found.get(writer, []), step, count) for writer, count in view.visible(segment, stream).items()
    }


def _first_beyond(db: sa.Connection, found: Sequence[Chunk], step: int, count: int) -> int:
    for chunk in found:
        if chunk.step_hi > step:
            steps = steps_of(load_many(db, [chunk.pk], ["_step"])[chunk.pk], chunk.rows)[: chunk.visible]
            beyond = np.flatnonzero(steps > step)
            if len(beyond):
                return chunk.seq_lo + int(beyond[0])
    return count


def position(
    db: sa.Connection, run: sa.RowMapping, attempt: int, step: int | None, stored: dict[str, Any] | None
) -> RunPosition:
    """Where `attempt` of a run stands, cut at `step` when it is given. `stored`: the summary of the whole, when it is known.

    Names the run that the watermark counts in: below a fork's branch point that is its source.
    """
    named = run["run_id"]
    view = view_of(db, int(run["pk"]), attempt)
    if step is None:
        watermark = whole(view, attempt, last_step(db, view))
        summary = summary_of(db, view, json.loads(run["config"])) if stored is None else stored
    else:
        source = Source(int(run["pk"]), attempt, run["run_id"])
        base, _ = resolve(db, source.pk, source, BeginAttempt(attempt + 1, "n", "w", at_step=step))
        assert base is not None
        watermark = base.watermark
        summary = summary_of(db, cut_of(db, base), json.loads(run["config"]))
        named = db.execute(sa.select(runs.c.run_id).where(runs.c.pk == base.run)).scalar_one()
    return RunPosition(named, run["project"], run["entity"], watermark, summary, _runtime(summary))


def _runtime(summary: dict[str, Any]) -> float:
    inner = summary.get("_wandb")
    found = [summary.get("_runtime"), inner.get("runtime") if isinstance(inner, dict) else None]
    return max((float(value) for value in found if isinstance(value, int | float)), default=0.0)


def lineage(db: sa.Connection, pk: int, attempt: int) -> list[dict[str, Any]]:
    """What an attempt was built on, what that was, and so on: newest first."""
    out: list[dict[str, Any]] = []
    seen = {(pk, attempt)}
    statement = sa.select(attempts.c.origin).where(
        (attempts.c.run_pk == sa.bindparam("key")) & (attempts.c.attempt == sa.bindparam("number"))
    )
    while (text := db.execute(statement, {"key": pk, "number": attempt}).scalar()) is not None:
        origin = msgspec.json.decode(text, type=Origin)
        pk, attempt = origin.run, origin.attempt
        if (pk, attempt) in seen:
            break
        seen.add((pk, attempt))
        run_id = db.execute(sa.select(runs.c.run_id).where(runs.c.pk == pk)).scalar_one()
        out.append({"run": run_id, "attempt": attempt, "step": origin.step, "kind": origin.kind})
    return out
