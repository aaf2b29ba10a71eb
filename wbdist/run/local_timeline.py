"""Where a job's wall-clock time went, as the journals below one root tell: without any server."""

from __future__ import annotations

from pathlib import Path

import msgspec

from wbdist.core.goodput import Life, Mark, phases_of, read_mark
from wbdist.run.journal_format import BODY_HEAD, FRAME_HEAD, PACKED_HEAD, Kind
from wbdist.run.journal_reader import JournalReader
from wbdist.run.local_history import LocalRun

_PACKED = frozenset({int(Kind.ROW_PACKED), int(Kind.ROW_PACKED_COMMIT)})
_SIGNS = frozenset({int(Kind.ROW), int(Kind.STATS), *_PACKED})
_HEAD = FRAME_HEAD.size + BODY_HEAD.size


def local_phases(root: Path, project: str, entity: str, run_id: str) -> dict[int, dict[str, float]]:
    """attempt -> seconds by phase, for the attempts of which there are journals here; empty when no job has written them.
    Reads these journals whole, about a second for a million rows. Raises OSError."""
    lives: dict[int, Life] = {}
    for journal in LocalRun(root, project, entity, run_id).journals:
        header = journal.header
        marks, seen = _signs(journal.path)
        known = lives.get(header.attempt)
        base = None if header.base is None or header.base_run else (header.base.attempt, header.base.step)
        if known is None:
            lives[header.attempt] = Life(header.attempt, header.created, marks, seen, base)
        else:  # another writer of the attempt, or a copy of this one's journal
            every = {mark.number: mark for mark in (*marks, *known.marks)}
            ordered = [every[number] for number in sorted(every)]
            lives[header.attempt] = msgspec.structs.replace(known, marks=ordered, seen=max(seen, known.seen))
    return phases_of(lives.values())


def _signs(path: Path) -> tuple[list[Mark], float]:
    """The marks of a journal, and the time of its last row or sample (0 without one)."""
    marks: list[Mark] = []
    seen = 0.0
    with JournalReader.open(path) as reader:
        at = reader.first
        while True:
            frames, at = reader.frames(at)
            if not frames:
                return marks, seen
            place, sign = 0, -1
            while place < len(frames):
                kind = frames[place + _HEAD - 1]
                end = place + FRAME_HEAD.size + FRAME_HEAD.unpack_from(frames, place)[0]
                if kind == Kind.PHASE:
                    time, row = msgspec.msgpack.decode(frames[place + _HEAD : end])
                    if (mark := read_mark(row, time)) is not None:
                        marks.append(mark)
                elif kind in _SIGNS:
                    sign = place
                place = end
            if sign >= 0:
                seen = max(seen, _time_of(frames, sign))


def _time_of(frames: bytes, place: int) -> float:
    body = place + FRAME_HEAD.size
    if frames[place + _HEAD - 1] in _PACKED:
        return float(PACKED_HEAD.unpack_from(frames, body)[4])
    end = body + FRAME_HEAD.unpack_from(frames, place)[0]
    return float(msgspec.msgpack.decode(frames[place + _HEAD : end])[0])
