"""Where a journal belongs whose run was to go on while nobody could tell what there is of it (`JournalHeader.behind`).

Its rows become an attempt of their own, behind everything the server shows when it is sent for the first time; the attempt's
nonce is how that attempt is found again. Later segments of its machine follow it, with the same distance between the machine's
numbers and the server's. Steps that would lie within what is there are moved on behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from wbdist.core.position import RunPosition
from wbdist.protocol.reads import RemoteAttempt
from wbdist.run.journal import JournalHeader, JournalReader, Kind


class Place(msgspec.Struct, frozen=True):
    header: JournalHeader
    """With the attempt it is to be, and what that is built on."""
    shift: int = 0
    """What its steps grow by."""


class NotNowError(Exception):
    """It has no place before something else has happened; the message says what."""


def place(header: JournalHeader, path: Path, attempts: Sequence[RemoteAttempt], position: RunPosition | None) -> Place:
    """`attempts`, `position`: what the server has of the run. Raises NotNowError, OSError."""
    root = next((attempt for attempt in attempts if attempt.nonce == (header.root or header.nonce)), None)
    if root is None and not any(attempt.attempt == 0 or (attempt.attempt == 1 and attempt.nonce) for attempt in attempts):
        return Place(header)  # nothing is there but perhaps later segments of this very run: its own numbers are right
    newest = max(attempts, key=lambda attempt: attempt.attempt)
    if root is not None:
        number, last = root.attempt, root.base_step if root.base_attempt is not None else -1
        if number == 1:
            return Place(header)
    elif header.root:
        raise NotNowError(
            f"run {header.run_id} was begun on this journal's machine without knowing of what is on the server: send the "
            "journal of its first attempt there before this one; until then it is kept here"
        )
    else:
        number, last = newest.attempt + 1, -1 if position is None else position.watermark.step
    if newest.ended_at is None and not any(attempt.nonce == header.nonce for attempt in attempts):
        raise NotNowError(
            f"run {header.run_id} is being written now (attempt {newest.attempt}): what this journal holds is to go on "
            "behind it, so send it again when that has ended; until then it is kept here"
        )
    first = header.behind if header.root else first_step(path)
    shift = 0 if last < 0 else max(0, last + 1 - (first or 0))
    if header.base is not None:
        step = header.base.step + shift if header.base.step >= 0 else -1
        base = msgspec.structs.replace(header.base, attempt=header.base.attempt + number - 1, step=step)
        return Place(msgspec.structs.replace(header, attempt=header.attempt + number - 1, base=base), shift)
    at = {"base_run": header.run_id} if last < 0 else {"at_step": last}
    return Place(msgspec.structs.replace(header, attempt=number, **at), shift)


def first_step(path: Path) -> int | None:
    """Of a journal; None when no row names one. Raises JournalCorruptError, OSError."""
    with JournalReader.open(path) as reader:
        while records := reader.read():
            for record in records:
                if record.kind is Kind.ROW:
                    return record.step
    return None
