"""What runs say of artifacts: that they logged or used one, or that an alias means it now. Lines of the stream ARTIFACTS.

A line counts when the live view of its run admits it, so that a preemption, a rewind or a fenced writer takes aliases back with
the history; what a person says through the API counts always. Of several that count, the newest is true.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.position import ARTIFACTS
from wbdist.protocol.attempts import FileStamp
from wbdist.server.store.appending import NO_NONCE, Insert
from wbdist.server.store.artifact_schema import lines
from wbdist.server.store.attempts import attempt_of
from wbdist.server.store.chunks import Key
from wbdist.server.store.filecuts import SERVER
from wbdist.server.store.schema import cursors, runs
from wbdist.server.store.views import View, view_of


class Said(msgspec.Struct, frozen=True):
    """One statement about an artifact."""

    kind: str
    """output, input, alias, unalias"""
    artifact: int
    collection: int
    alias: str = ""


class Wanted(msgspec.Struct, frozen=True):
    """What is to be said of an artifact when it is committed, and where in the run's history it stands."""

    aliases: tuple[str, ...] = ()
    stamp: FileStamp | None = None


def say(
    db: sa.Connection, insert: Insert, run: int | None, said: Iterable[Said], *, now: float, stamp: FileStamp | None = None
) -> None:
    """Appends lines. With a stamp all have its seq, and nothing happens when that is known; a stamp of an attempt that was
    never begun counts as a rival's."""
    found = list(said)
    values = [{"kind": s.kind, "artifact_pk": s.artifact, "collection_pk": s.collection, "alias": s.alias} for s in found]
    if run is None:
        key = {"run_pk": None, "attempt": 0, "lane": "", "writer": "", "seq": 0, "step": -1, "created_at": now}
        db.execute(sa.insert(lines), [key | value for value in values])
        return
    row = db.execute(sa.select(runs.c.attempt, runs.c.last_step).where(runs.c.pk == run)).one()
    attempt, lane, writer = row.attempt, "", SERVER
    if stamp is not None:
        attempt, writer = stamp.attempt, stamp.writer
        known = attempt_of(db, run, attempt)
        lane = "" if known is not None and known["nonce"] == stamp.nonce else stamp.nonce or NO_NONCE
    line = Key(run, attempt, lane, ARTIFACTS, writer)
    where = msgspec.structs.asdict(line)
    position = sa.select(cursors.c.next).where(*(cursors.c[name] == value for name, value in where.items()))
    seq = int(db.execute(position).scalar() or 0) if stamp is None else stamp.seq
    key = {"run_pk": run, "attempt": attempt, "lane": lane, "writer": writer, "seq": seq}
    if stamp is not None:
        same = sa.select(lines.c.pk).where(*(lines.c[name] == value for name, value in key.items()))
        if db.execute(same.limit(1)).first() is not None:
            return
    step = row.last_step if stamp is None or stamp.step is None else stamp.step
    db.execute(sa.insert(lines), [{**key, "step": step, "created_at": now} | value for value in values])
    move = insert(cursors).values(**where, next=seq + 1)
    later = sa.case((cursors.c.next > move.excluded.next, cursors.c.next), else_=move.excluded.next)
    db.execute(move.on_conflict_do_update(index_elements=list(where), set_={"next": later}))
    db.execute(sa.update(runs).where(runs.c.pk == run).values(version=runs.c.version + 1))


class Truth:
    """Which lines count, now; the views of runs are read once each."""

    def __init__(self, db: sa.Connection) -> None:
        self._db = db
        self._views: dict[int, View] = {}

    def counts(self, row: Any) -> bool:
        """Whether a line of `lines` is part of its own run's live view, or said by no run."""
        if row.run_pk is None:
            return True
        if row.lane:
            return False
        view = self._views.get(row.run_pk)
        if view is None:
            current = self._db.execute(sa.select(runs.c.attempt).where(runs.c.pk == row.run_pk)).scalar_one()
            view = self._views[row.run_pk] = view_of(self._db, row.run_pk, current)
        segment = view.own(row.attempt)
        return segment is not None and segment.admits(ARTIFACTS, row.writer, row.seq)

    def aliases(self, collection: int) -> dict[str, int]:
        """alias -> the artifact it means."""
        where = (lines.c.collection_pk == collection) & lines.c.kind.in_(["alias", "unalias"])
        out: dict[str, int] = {}
        for row in self._db.execute(sa.select(lines).where(where).order_by(lines.c.pk)):
            if not self.counts(row):
                continue
            if row.kind == "alias":
                out[row.alias] = row.artifact_pk
            elif out.get(row.alias) == row.artifact_pk:
                del out[row.alias]
        return out


def of_run(db: sa.Connection, run: int, attempt: int, kind: str) -> list[int]:
    """Artifacts that a run logged (`output`) or used (`input`), as `attempt` sees it; in order, each once."""
    view = view_of(db, run, attempt)
    found: dict[int, None] = {}
    for segment in view.segments:
        where = (
            (lines.c.run_pk == segment.run)
            & (lines.c.attempt == segment.attempt)
            & (lines.c.lane == view.lane)
            & (lines.c.kind == kind)
        )
        for row in db.execute(sa.select(lines).where(where).order_by(lines.c.pk)):
            if segment.admits(ARTIFACTS, row.writer, row.seq):
                found[row.artifact_pk] = None
    return list(found)


def users(db: sa.Connection, artifact: int) -> list[int]:
    """Runs whose live view says that they used an artifact."""
    truth = Truth(db)
    where = (lines.c.artifact_pk == artifact) & (lines.c.kind == "input")
    found = [row.run_pk for row in db.execute(sa.select(lines).where(where).order_by(lines.c.pk)) if truth.counts(row)]
    return list(dict.fromkeys(found))


def wanted_of(text: str) -> Wanted:
    return msgspec.convert(json.loads(text), Wanted)
