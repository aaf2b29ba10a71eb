"""What a job says about its attempts: one line when it goes on, one when it is done."""

from __future__ import annotations

from pathlib import Path

from wbdist.checkpoint.manifest import Manifest, committed
from wbdist.errors import Error
from wbdist.protocol import reads
from wbdist.run.handle import Run

PATIENCE = 2.0
"""Seconds that the last line waits for the server's numbers; it is said without them then."""
PREEMPTION = "preemption"
"""A checkpoint's reason when all of its attempt is in it."""


def cause_of_restart(directory: Path) -> str:
    """Why a job on `directory` is started again, as far as its checkpoints tell, when no launcher says it; '' unknown."""
    found = committed(directory)
    last = max((int(path.stem) for path in (directory / "attempts").glob("*.json") if path.stem.isdigit()), default=0)
    return "preempted" if found and found[0].attempt == last and found[0].reason == PREEMPTION else ""


def going_on(attempt: int, cause: str, chosen: Manifest | None) -> str:
    """`attempt` (2 or more) began: from where, why, and what became of what the one before had logged."""
    before = attempt - 1
    why = f"attempt {before} ended" + (f" ({cause})" if cause != "restart" else "")
    if chosen is None:
        return f"attempt {attempt} starts from the beginning, there is no checkpoint: {why}; what was logged is archived"
    lost = f"rows from step {chosen.step} on are archived"
    if chosen.attempt == before and chosen.reason in {PREEMPTION, "end"}:
        lost = "nothing was lost"
    return f"attempt {attempt} goes on from step {chosen.step} ({chosen.name}): {why}; {lost}"


def in_total(run: Run, attempt: int) -> str:
    """The job is done after `attempt` (2 or more) attempts: what that cost. Asks the server, at most about PATIENCE seconds."""
    said = f"done in {attempt} attempts"
    if run.settings.mode != "online" or not run.url:
        return said
    try:
        from wbdist.run.reader import Api

        api = Api(timeout=PATIENCE, settings=run.settings)
        attempts = reads.read_attempts(api.execute(reads.attempts(run.entity, run.project, run.id)))
    except Error:
        return said
    rows, lost = sum(one.rows_archived for one in attempts), sum(one.lost_seconds for one in attempts)
    cost = f"{lost:.1f} s of training done in vain ({rows} rows archived)" if rows else "nothing done in vain"
    return f"{said}, {cost}; see: wbdist attempts {run.path}"
