"""Journals on their way into a checkpoint and out of it: what the mechanisms tell each other about them.

The *tail* of a run's history at a cut is what of it the server has not acknowledged, or could lose together with this
machine. It travels inside the checkpoint, so that a checkpoint alone suffices to have the history up to its cut.
"""

from __future__ import annotations

import msgspec


class JournalPrefix(msgspec.Struct, frozen=True):
    """The first `size` bytes of the journal at `path`: header and whole frames, up to a cut. They never change any more."""

    name: str
    """Names the journal among all of a job: the same one has the same name in every checkpoint."""
    path: str
    size: int


class JournalCopy(msgspec.Struct, frozen=True):
    """A journal's prefix as a checkpoint holds it: files which, one after the other, are its bytes."""

    segments: tuple[str, ...]
