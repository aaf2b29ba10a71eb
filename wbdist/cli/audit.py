"""`wbdist audit`: was each sample used exactly once an epoch?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click
import msgspec

from wbdist.errors import Error

if TYPE_CHECKING:
    from wbdist.hooks.ledger import Audit, Order
    from wbdist.run.remote_run import RunRecord

SHOWN = 20
"""Problems before the rest is counted; --json has all."""


@click.command("audit", epilog="Example: wbdist audit digits/ab12cd34   |   wbdist audit digits/ab12cd34-r0 digits/ab12cd34-r1")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(paths: tuple[str, ...], as_json: bool) -> None:
    """Prove from a run's history that each sample was used exactly once in each epoch, and in the right order.

    PATH is `project/id` or `entity/project/id` of a job's run; with strategy per_rank, give the runs of all its ranks. Every
    row that job.steps() closed carries a fingerprint of the samples it used; the audit computes them anew from the seed of the
    data order. Needs neither the data set nor the checkpoints. Offline runs: `wbdist sync` first.

    Exit code 1 when a sample was doubled, missing or another one than the order has.
    """
    from wbdist.hooks.ledger import COLUMNS, audit
    from wbdist.run.reader import Api

    try:
        runs = [Api().run(path) for path in paths]
        orders: dict[int, Order] = {}
        for run in runs:
            orders |= _orders(run)
        found = audit([run.scan_history(keys=list(COLUMNS)) for run in runs], orders)
    except Error as error:
        click.echo(f"wbdist audit: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps({"ok": not found.problems, **msgspec.to_builtins(found)}, indent=2))
    else:
        _show(found)
    if found.problems:
        sys.exit(1)


def _orders(run: RunRecord) -> dict[int, Order]:
    from wbdist.hooks.ledger import Order

    return {int(row["_step"]): Order.parse(row["_data"]) for row in run.scan_history(keys=["_step", "_data"])}


def _show(found: Audit) -> None:
    names = ("epoch", "steps", "samples", "used once", "doubled", "missing", "left out", "to come")
    lines: list[tuple[str, ...]] = [names]
    for one in found.epochs:
        counts = (one.doubled, one.missing, one.left_out, one.to_come)
        facts = (one.epoch, one.steps, one.length, one.once)
        lines.append((*map(str, facts), *(str(n) if n else "-" for n in counts)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    click.echo()
    for problem in found.problems[:SHOWN]:
        click.echo(problem)
    if len(found.problems) > SHOWN:
        click.echo(f"and {len(found.problems) - SHOWN} more; --json has all")
    if found.problems:
        click.echo(f"\nNOT exactly once: {len(found.problems)} findings.")
    else:
        steps = sum(one.steps for one in found.epochs)
        click.echo(f"Exactly once: nothing doubled, nothing missing; all {steps} steps used the samples of the data order.")
