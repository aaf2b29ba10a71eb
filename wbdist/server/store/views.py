"""What of a run is visible: the live view of its attempts, applied to cursors and chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.attempts import Segment, live_view
from wbdist.core.position import STREAMS, Watermark
from wbdist.server.store.chunks import Chunk, Key
from wbdist.server.store.schema import attempts, chunks, cursors


class View(msgspec.Struct):
    """The live view of one attempt, and how far each of its writers has got."""

    run_pk: int
    segments: tuple[Segment, ...]
    cursors: dict[int, dict[str, dict[str, int]]]
    """attempt -> stream -> writer -> next seq, in the lane."""
    lane: str = ""

    def visible(self, segment: Segment, stream: str) -> dict[str, int]:
        """writer -> its visible lines in a segment, sorted by writer, those with none left out."""
        written = self.cursors.get(segment.attempt, {}).get(stream, {})
        if segment.limits is None:
            return {writer: written[writer] for writer in sorted(written) if written[writer]}
        limits = segment.limits.get(stream, {})
        return {w: n for w in sorted(written) if (n := min(written[w], limits.get(w, 0))) > 0}

    def written(self, stream: str, attempt: int) -> int:
        """Lines of an attempt, seen or not."""
        return sum(self.cursors.get(attempt, {}).get(stream, {}).values())

    def live(self, stream: str, attempt: int) -> int:
        """Lines of an attempt that are visible."""
        return sum(sum(self.visible(s, stream).values()) for s in self.segments if s.attempt == attempt)

    def total(self, stream: str) -> int:
        """Visible lines."""
        return sum(sum(self.visible(segment, stream).values()) for segment in self.segments)

    def below(self, stream: str, attempt: int) -> int:
        """Lines that an attempt is built on: the W&B offset of its first. Counted by the watermarks, whether they have
        arrived or not, so that the number does not depend on the order of arrival."""
        total = 0
        for segment in self.segments:
            if segment.attempt < attempt:
                counts = segment.limits.get(stream, {}) if segment.limits is not None else self.visible(segment, stream)
                total += sum(counts.values())
        return total

    def all_below(self, attempt: int) -> dict[str, int]:
        """stream -> `below`, for the streams that have any."""
        return {stream: below for stream in STREAMS if (below := self.below(stream, attempt))}

    def admits(self, attempt: int, writer: str, counts: Mapping[str, int]) -> bool:
        """Whether all of these lines (stream -> their number) are visible."""
        segment = next((s for s in self.segments if s.attempt == attempt), None)
        return segment is not None and all(segment.admits(stream, writer, n - 1) for stream, n in counts.items() if n)


def view_of(db: sa.Connection, pk: int, attempt: int, lane: str | None = None) -> View:
    """The view of `attempt`; of attempt 0 (a run of the plain SDK) everything outside attempts; nothing of an unknown one.

    `lane`: instead, what a rival of that attempt wrote under this nonce; nothing of that is ever part of a live view.
    """
    found: dict[int, dict[str, dict[str, int]]] = {}
    where = (cursors.c.run_pk == pk) & (cursors.c.lane == (lane or ""))
    statement = sa.select(cursors.c.attempt, cursors.c.stream, cursors.c.writer, cursors.c.next).where(where)
    for at, stream, writer, count in db.execute(statement):
        found.setdefault(at, {}).setdefault(stream, {})[writer] = count
    if lane is not None:
        return View(pk, (Segment(attempt),), found, lane)
    bases: dict[int, Watermark | None] = {0: None}
    for row in db.execute(sa.select(attempts.c.attempt, attempts.c.base).where(attempts.c.run_pk == pk)):
        bases[row.attempt] = None if row.base is None else msgspec.json.decode(row.base, type=Watermark)
    return View(pk, live_view(bases, attempt) if attempt in bases else (), found)


def next_of(db: sa.Connection, pk: int, attempt: int) -> dict[str, dict[str, int]]:
    """stream -> writer -> next seq of an attempt."""
    return view_of(db, pk, attempt).cursors.get(attempt, {})


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
        (chunks.c.run_pk == view.run_pk)
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
            key = Key(view.run_pk, segment.attempt, view.lane, stream, writer)
            out[writer].append(Chunk(pk, key, low, high, step_hi, bool(whole), min(high, limit) - low, json.loads(names)))
    return {writer: found for writer, found in out.items() if found}
