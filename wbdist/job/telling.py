"""What a job says about its attempts: one line when it goes on, one when it is done."""

from __future__ import annotations

from pathlib import Path

from wbdist.checkpoint.manifest import Manifest, committed
from wbdist.core.goodput import goodput
from wbdist.errors import Error
from wbdist.protocol import reads
from wbdist.run.handle import Run
from wbdist.run.local_timeline import local_phases

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


def in_total(run: Run, attempt: int) -> list[str]:
    """The job is done after `attempt` attempts: what that cost, a line each. Asks the server, at most about PATIENCE seconds;
    else reads the journals that are here."""
    told = _asked(run)
    said = []
    if attempt > 1:
        line = f"done in {attempt} attempts"
        if told is not None:
            rows, lost = sum(one.rows_archived for one in told), sum(one.lost_seconds for one in told)
            cost = f"{lost:.1f} s of training done in vain ({rows} rows archived)" if rows else "nothing done in vain"
            line += f", {cost}; see: wbdist attempts {run.path}"
        said.append(line)
    phases = {one.attempt: one.phases for one in told or () if one.phases is not None} or _read(run)
    if (found := goodput(phases.values())) is not None:
        unknown = [str(number) for number in range(1, attempt) if number not in phases]
        where = f"; attempts that are not here: {', '.join(unknown)}" if unknown else ""
        said.append(f"{found}{where}")
    return said


def _asked(run: Run) -> list[reads.RemoteAttempt] | None:
    if run.settings.mode != "online" or not run.url:
        return None
    try:
        from wbdist.run.reader import Api

        api = Api(timeout=PATIENCE, settings=run.settings)
        return reads.read_attempts(api.execute(reads.attempts(run.entity, run.project, run.id)))
    except Error:
        return None


def _read(run: Run) -> dict[int, dict[str, float]]:
    if run.journal_path is None:
        return {}
    try:
        return local_phases(Path(run.journal_path).parents[1], run.project, run.entity, run.id)
    except OSError:
        return {}
