"""Where a run stands: the values that tie a checkpoint to the run's history.

History belongs to attempts. An *attempt* is one life of a job, numbered from 1. A *writer* is one process that appends
to a run within an attempt. A *stream* is one append-only sequence of lines: history rows, console lines, system-metric
events. A line is named for ever by (run, attempt, writer, stream, seq), with seq counted from 0 without gaps; the same
name always means the same line, so delivering it twice changes nothing.
"""

from __future__ import annotations

import msgspec

HISTORY = "wandb-history.jsonl"
EVENTS = "wandb-events.jsonl"
CONSOLE = "output.log"
SUMMARY = "wandb-summary.json"
FILES = "files"
"""Versions of files, one line each."""
ARTIFACTS = "artifacts"
"""What a run said of artifacts: logged, used, named."""
ALERTS = "wbdist-alerts.jsonl"
"""What `Run.alert` said, one line each. W&B's wire has a mutation for it in place of a stream."""
PHASES = "wbdist-phases.jsonl"
"""Where an attempt's time went (`core/goodput.py`). It belongs to its attempt, so no watermark counts it."""
STREAMS = (HISTORY, EVENTS, CONSOLE, ALERTS, PHASES)
"""The streams of lines that a file_stream request may carry."""

Counts = dict[str, dict[str, int]]
"""stream -> writer -> number of lines (so the next seq)."""


class Watermark(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """A cut through a run's history: everything a new attempt builds upon.

    Visible below the cut are: in `attempt`, the first `counts[stream][writer]` lines of each writer, and everything
    that attempt itself was built upon. A stream or writer that is absent counts 0 lines.
    """

    attempt: int
    """The attempt in which the cut lies; 0 for what W&B's own client wrote before any attempt was begun."""
    counts: Counts
    step: int = -1
    """The last history `_step` at or below the cut; -1 when there is none."""


class RunPosition(msgspec.Struct, frozen=True):
    """What a checkpoint's manifest stores about the run, and what a new attempt starts from."""

    run_id: str
    project: str
    entity: str
    watermark: Watermark
    summary: dict[str, object] = {}
    """The run's summary at the watermark."""
    runtime: float = 0.0
    """Seconds of run time (`_runtime`) at the watermark, over all attempts."""
