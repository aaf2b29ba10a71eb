"""Our optional part of the wire: what W&B's cannot say about attempts, writers and sequence numbers.

Other servers ignore these fields; a client finds out whether they count by looking for FEATURE in `serverInfo.features`.
"""

from __future__ import annotations

import json

import msgspec

from wbdist.core.position import Counts, Watermark

FEATURE = "WBDIST_ATTEMPTS"
FIELD = "wbdist"
"""Key of our object inside file_stream requests and answers."""
SHARED = "shared"
"""How the nonce begins that all writers of a shared run have in common: the server makes the summary of their rows, and adds
what one of them set by hand."""


class Ended(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a writer's process ended, as seen by the writer itself or by a witness."""

    cause: str
    """`exit` (the writer's own word; `exitcode` is in the W&B field), `lost` (died without a word), `preempted`."""
    detail: str = ""
    at: float = 0.0
    """When, on the writer's clock; of a lost writer its last record. 0: now."""


class StreamStamp(msgspec.Struct, frozen=True, omit_defaults=True):
    """Names the lines of one file_stream request."""

    attempt: int
    nonce: str
    writer: str
    seq: dict[str, int] = {}
    """file -> seq of the first line in this request's `content`."""
    ended: Ended | None = None


STAMP_HEADER = "X-WBDIST-STAMP"
"""Header of a PUT of a run's file: a FileStamp as JSON. Other servers ignore it."""


class FileStamp(msgspec.Struct, frozen=True, omit_defaults=True):
    """Names one version of a file: line `seq` of `writer` in the stream FILES. Seqs may arrive in any order, and some never."""

    attempt: int
    nonce: str
    writer: str
    seq: int
    step: int | None = None
    """The run's last step when the file was saved; None: the last one that the server has."""

    def header(self) -> str:
        """Of STAMP_HEADER. ASCII alone, whatever the writer is called: HTTP's headers hold nothing else."""
        return json.dumps(msgspec.to_builtins(self), separators=(",", ":"))


class StreamAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the server says of our stamp. `code` is '' (stored), 'gap' or 'fenced' (both with HTTP 409)."""

    next: dict[str, int] = {}
    """file -> the next seq expected from this (attempt, writer)."""
    code: str = ""
    attempt: int = 0
    """The run's current attempt, when fenced."""


class BeginAttempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """Opens (attempt, nonce) on the base watermark, in one transaction. Repeating it changes nothing."""

    attempt: int
    nonce: str
    writer: str
    base: Watermark | None = None
    """None, with neither `at_step` nor `base_run`: start from nothing; everything older is archived."""
    cause: str = ""
    """Why this attempt exists, for people: 'start', 'preempted', 'lost', ..."""
    base_run: str = ""
    """Fork: the run (id or immutable id, of the same project) whose history `base` or `at_step` counts in; '' is this run.
    With neither of them: all that this run shows now."""
    at_step: int | None = None
    """Instead of `base`: keep the rows up to this step, inclusive. The server works it out once, when the attempt is begun."""
    fresh: tuple[str, ...] = ()
    """Streams that start empty although history continues."""
    started: float = 0.0
    """When it really began, on its own machine's clock: its journal may arrive much later. 0: now."""


class BegunAttempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """`accepted` is False when `attempt` is not ours any more: a newer one, or another nonce, holds the run."""

    accepted: bool
    attempt: int
    """The run's current attempt."""
    next: Counts = {}
    """stream -> writer -> next expected seq, within (attempt)."""
    lines: dict[str, int] = {}
    """stream -> number of live lines below this attempt: the W&B offset of its seq 0."""
