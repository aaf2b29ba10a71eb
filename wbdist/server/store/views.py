"""What of a run is visible: the live view of its attempts, applied to cursors and chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.attempts import Base, Segment, live_view
from wbdist.core.position import STREAMS, Watermark
from wbdist.server.store.chunks import Chunk, Key
from wbdist.server.store.schema import attempts, chunks, cursors


class View(msgspec.Struct):
    """The live view of one attempt, and how far each of its writers has got."""

    run_pk: int
    segments: tuple[Segment, ...]
    """Oldest first; those of a fork begin in other runs."""
    cursors: dict[tuple[int, int], dict[str, dict[str, int]]]
    """(run, attempt) -> stream -> writer -> next seq, in the lane."""
    lane: str = ""

    def visible(self, segment: Segment, stream: str) -> dict[str, int]:
        """writer -> its visible lines in a segment, sorted by writer, those with none left out."""
        written = self.cursors.get((segment.run, segment.attempt), {}).get(stream, {})
        if segment.limits is None:
            return {writer: written[writer] for writer in sorted(written) if written[writer]}
        limits = segment.limits.get(stream, {})
        return {w: n for w in sorted(written) if (n := min(written[w], limits.get(w, 0))) > 0}

    def next_of(self, attempt: int) -> dict[str, dict[str, int]]:
        """stream -> writer -> next seq of an attempt of the run."""
        return self.cursors.get((self.run_pk, attempt), {})

    def written(self, stream: str, attempt: int) -> int:
        """Lines of an attempt of the run, seen or not."""
        return sum(self.next_of(attempt).get(stream, {}).values())

    def live(self, stream: str, attempt: int) -> int:
        """Lines of an attempt of the run that are visible."""
        segment = self.own(attempt)
        return 0 if segment is None else sum(self.visible(segment, stream).values())

    def own(self, attempt: int) -> Segment | None:
        """The part of an attempt of the run that is visible."""
        return next((s for s in self.segments if (s.run, s.attempt) == (self.run_pk, attempt)), None)

    def streams(self) -> list[str]:
        """Streams that any attempt of the view has lines of."""
        return sorted({stream for by_stream in self.cursors.values() for stream in by_stream})

    def total(self, stream: str) -> int:
        """Visible lines."""
        return sum(sum(self.visible(segment, stream).values()) for segment in self.segments)

    def below(self, stream: str, attempt: int) -> int:
        """Lines that an attempt is built on: the W&B offset of its first. Counted by the watermarks, whether they have
        arrived or not, so that the number does not depend on the order of arrival."""
        total = 0
        for segment in self.segments:
            if segment.run != self.run_pk or segment.attempt < attempt:
                counts = segment.limits.get(stream, {}) if segment.limits is not None else self.visible(segment, stream)
                total += sum(counts.values())
        return total

    def all_below(self, attempt: int) -> dict[str, int]:
        """stream -> `below`, for the streams that have any."""
        return {stream: below for stream in STREAMS if (below := self.below(stream, attempt))}

    def admits(self, attempt: int, writer: str, counts: Mapping[str, int]) -> bool:
        """Whether all of these lines (stream -> their number) are visible."""
        segment = self.own(attempt)
        return segment is not None and all(segment.admits(stream, writer, n - 1) for stream, n in counts.items() if n)


class Bases:
    """What attempts are built upon, read a run at a time; attempt 0 (everything outside attempts) on nothing."""

    def __init__(self, db: sa.Connection) -> None:
        self._db = db
        self._runs: dict[int, dict[int, Base | None]] = {}

    def of_run(self, pk: int) -> dict[int, Base | None]:
        """attempt -> its base, for all that are known."""
        if pk not in self._runs:
            found: dict[int, Base | None] = {0: None}
            for attempt, base_run, base, fresh in self._db.execute(_BASES, {"key": pk}):
                found[attempt] = None
                if base is not None:
                    watermark = msgspec.json.decode(base, type=Watermark)
                    found[attempt] = Base(base_run or pk, watermark, frozenset(json.loads(fresh)))
            self._runs[pk] = found
        return self._runs[pk]

    def __call__(self, pk: int, attempt: int) -> Base | None:
        return self.of_run(pk).get(attempt)


_BASES = sa.select(attempts.c.attempt, attempts.c.base_run, attempts.c.base, attempts.c.fresh).where(
    attempts.c.run_pk == sa.bindparam("key")
)
_CURSORS = sa.select(cursors.c.attempt, cursors.c.stream, cursors.c.writer, cursors.c.next).where(
    (cursors.c.run_pk == sa.bindparam("key")) & (cursors.c.lane == sa.bindparam("lane"))
)


def view_of(db: sa.Connection, pk: int, attempt: int, lane: str | None = None) -> View:
    """The view of `attempt`; of attempt 0 (a run of the plain SDK) everything outside attempts; nothing of an unknown one.

    `lane`: instead, what a rival of that attempt wrote under this nonce; nothing of that is ever part of a live view.
    Raises ValueError when the attempt is, by way of others, based on itself.
    """
    if lane is not None:
        return View(pk, (Segment(attempt, None, pk),), _cursors(db, [pk], lane), lane)
    bases = Bases(db)
    segments = live_view(bases, pk, attempt) if attempt in bases.of_run(pk) else ()
    return View(pk, segments, _cursors(db, sorted({pk, *(s.run for s in segments)}), ""))


def cut_of(db: sa.Connection, base: Base) -> View:
    """What is visible below a cut."""
    view = view_of(db, base.run, base.watermark.attempt)
    if not view.segments:
        return view
    top = msgspec.structs.replace(view.segments[-1], limits=base.watermark.counts)
    return msgspec.structs.replace(view, segments=(*view.segments[:-1], top))


def _cursors(db: sa.Connection, runs: list[int], lane: str) -> dict[tuple[int, int], dict[str, dict[str, int]]]:
    found: dict[tuple[int, int], dict[str, dict[str, int]]] = {}
    for pk in runs:
        for attempt, stream, writer, count in db.execute(_CURSORS, {"key": pk, "lane": lane}):
            found.setdefault((pk, attempt), {}).setdefault(stream, {})[writer] = count
    return found


def chunks_of(
    db: sa.Connection,
    view: View,
    segment: Segment,
    stream: str,
    *,
    min_step: int = 0,
    max_step: int | None = None,
    keys: bool = False,
) -> dict[str, list[Chunk]]:
    """writer -> its visible chunks in a segment, in order, without those outside [min_step, max_step).

    `keys`: also which keys they have. Reads index entries only.
    """
    where = (
        (chunks.c.run_pk == segment.run)
        & (chunks.c.attempt == segment.attempt)
        & (chunks.c.lane == view.lane)
        & (chunks.c.stream == stream)
    )
    if min_step > 0:
        where &= chunks.c.step_hi >= min_step
    if max_step is not None:
        where &= chunks.c.step_lo < max_step
    entry: list[sa.ColumnElement[Any]] = [
        chunks.c.pk,
        chunks.c.writer,
        chunks.c.seq_lo,
        chunks.c.seq_hi,
        chunks.c.step_hi,
        chunks.c.blob.is_not(None),
    ]
    # Not `chunks.c.keys`: that is a method.
    entry.append(chunks.c["keys"] if keys else sa.literal("{}"))
    statement = sa.select(*entry).where(where)
    out: dict[str, list[Chunk]] = {writer: [] for writer in view.visible(segment, stream)}
    for pk, writer, low, high, step_hi, whole, names in db.execute(statement.order_by(chunks.c.writer, chunks.c.seq_lo)):
        limit = high if segment.limits is None else segment.limits.get(stream, {}).get(writer, 0)
        if limit > low:
            key = Key(segment.run, segment.attempt, view.lane, stream, writer)
            out[writer].append(Chunk(pk, key, low, high, step_hi, bool(whole), min(high, limit) - low, json.loads(names)))
    return {writer: found for writer, found in out.items() if found}
