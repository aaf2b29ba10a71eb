"""What `wbdist sync` does about ranks' feeds: the rows that no aggregator lived to write become a journal of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from wbdist.run.journal import SUFFIX


def replayed(journals: Sequence[Path], *, without_missing: bool) -> tuple[list[Path], int]:
    """Replays the feeds among and beside `journals`; the journals made of them, and how many attempts could not be replayed.

    Says on stderr what it did and could not do. That ranks are missing of an attempt which a later one has replaced is no
    problem: the job went on from its checkpoint.
    """
    roots = {path.parent.parent for path in journals} | {path.parent for path in journals}
    if not any(next(root.glob(f"*/feed*{SUFFIX}"), None) for root in roots):
        return [], 0  # the usual case: nothing more is loaded
    from wbdist.distributed import replay

    made: list[Path] = []
    problems = 0
    groups = replay.groups(journals)
    newest: dict[tuple[str, str], int] = {}
    for group in groups:
        newest[group.header.project, group.header.run_id] = group.header.attempt
    for group in groups:
        header = group.header
        done = replay.replay(group, without_missing=without_missing)
        name = f"{header.project}/{header.run_id} attempt {header.attempt}"
        if done.journal is not None:
            made.append(done.journal)
            click.echo(
                f"{name}: {done.rows} rows that were in the ranks' journals alone are in the run ({done.journal})", err=True
            )
        elif done.word == "failed" or (done.word == "incomplete" and header.attempt == newest[header.project, header.run_id]):
            problems += 1
            click.echo(f"wbdist sync: {done.why}", err=True)
        elif done.word == "elsewhere":
            click.echo(f"wbdist sync: {done.why}", err=True)
    return made, problems
