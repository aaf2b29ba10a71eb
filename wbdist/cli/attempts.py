"""`wbdist attempts`: the lives of one run, why each began and ended, and what it cost."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import click

from wbdist.core.goodput import PHASES, WORDS, Goodput, duration, goodput
from wbdist.errors import Error
from wbdist.protocol.reads import RemoteAttempt
from wbdist.run.reader import Api
from wbdist.run.remote_run import RunRecord

WIDE = 46
"""Characters of a reason before it is cut; --json has all of it."""
_WORDS = frozenset({"began", "why", "ended"})
"""Columns of words; the others are numbers."""


@click.command("attempts", epilog="Example: wbdist attempts digits/ab12cd34   |   wbdist attempts local/digits/ab12cd34 --json")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: str, as_json: bool) -> None:
    """Show the attempts of a run (PATH: `project/id` or `entity/project/id`), oldest first.

    An attempt is one life of a job. A new one goes on from a checkpoint; what the one before had logged beyond that is
    archived: kept and readable, not part of the run's history. `lost` is the training time that was done in vain.
    """
    try:
        run = Api().run(path)
        attempts = run.attempts()
    except Error as error:
        click.echo(f"wbdist attempts: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps([_facts(run, attempt) for attempt in attempts], indent=2))
    elif not attempts:
        click.echo(f"run {run.id} has no attempts: another client than wbdist logged it")
    else:
        _table(run, attempts)


def _facts(run: RunRecord, attempt: RemoteAttempt) -> dict[str, Any]:
    return {
        "attempt": attempt.attempt,
        "path": _path(run, attempt),
        "started_at": attempt.started_at,
        "ended_at": attempt.ended_at,
        "cause": attempt.cause,
        "began": attempt.began,
        "end_cause": attempt.end_cause,
        "exit_code": attempt.exit_code,
        "ended": attempt.ended,
        "base_attempt": attempt.base_attempt,
        "base_step": attempt.base_step,
        "rows": attempt.rows,
        "rows_live": attempt.rows_live,
        "rows_archived": attempt.rows_archived,
        "lost_seconds": attempt.lost_seconds,
        "phases": attempt.phases,
    }


def _table(run: RunRecord, attempts: list[RemoteAttempt]) -> None:
    names = ("#", "began", "why", "took", "ended", "from step", "rows", "archived", "lost")
    _columns([names, *map(_row, attempts)])
    archived = [attempt for attempt in attempts if attempt.rows_archived]
    count = f"{len(attempts)} attempt{'s' if len(attempts) > 1 else ''}"
    if not archived:
        click.echo(f"\n{count}, nothing archived.")
    else:
        lost = duration(sum(attempt.lost_seconds for attempt in attempts))
        rows = sum(attempt.rows_archived for attempt in attempts)
        click.echo(f"\n{count}, {lost} of training done in vain, {rows} rows archived. As an attempt saw the run:")
        click.echo(f"  wbdist.Api().run({_path(run, archived[-1])!r}).scan_history()")
    if (found := goodput(attempt.phases for attempt in attempts if attempt.phases is not None)) is not None:
        click.echo()
        _timeline(found, attempts)


def _timeline(found: Goodput, attempts: list[RemoteAttempt]) -> None:
    """Where the time of each went: phases that took any."""
    shown = [name for name in PHASES if found.phases[name]]
    table = [("#", *(WORDS.get(name, name) for name in shown), "in all")]
    for attempt in attempts:
        if (phases := attempt.phases) is not None:
            cells = (duration(phases[name]) if phases[name] else "-" for name in shown)
            table.append((str(attempt.attempt), *cells, duration(sum(phases.values()))))
    _columns(table)
    click.echo(f"\n{found}")


def _columns(table: list[tuple[str, ...]]) -> None:
    # By hand: a terminal's table cuts what does not fit, and this is also read in files and through pipes.
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (
            cell.ljust(width) if name in _WORDS else cell.rjust(width)
            for name, cell, width in zip(table[0], row, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def _path(run: RunRecord, attempt: RemoteAttempt) -> str:
    """The run as that attempt saw it; `run` may be one of these itself."""
    entity, project, name = run.path
    return f"{entity}/{project}/{name.partition(':')[0]}:{attempt.attempt}"


def _row(attempt: RemoteAttempt) -> tuple[str, ...]:
    return (
        str(attempt.attempt),
        datetime.fromtimestamp(attempt.started_at).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        attempt.began if len(attempt.began) <= WIDE else attempt.began[: WIDE - 3] + "...",
        "" if attempt.ended_at is None else duration(attempt.ended_at - attempt.started_at),
        attempt.ended,
        str(attempt.base_step + 1),
        str(attempt.rows),
        str(attempt.rows_archived) if attempt.rows_archived else "-",
        duration(attempt.lost_seconds) if attempt.lost_seconds else "-",
    )
