"""`wbdist runs`: what the server has."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from wbdist.errors import Error
from wbdist.run.reader import Api
from wbdist.run.remote_run import RunRecord

SHOWN_METRICS = 4


@click.command("runs", epilog="Example: wbdist runs digits --group night   |   wbdist runs local/digits/ab12cd34 --json")
@click.argument("path", required=False)
@click.option("--group", help="Only runs of this group.")
@click.option("--state", help="Only runs in this state: running, finished, failed, crashed, killed, preempting, preempted.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: str | None, group: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List the runs of a project (PATH: `project` or `entity/project`), or show one run and its attempts (`entity/project/id`).

    Without PATH: the project of WANDB_PROJECT.
    """
    try:
        api = Api()
        if path and path.strip("/").count("/") == 2:
            _show(api.run(path), as_json)
            return
        wanted = {name: value for name, value in (("group", group), ("state", state)) if value}
        found: list[RunRecord] = []
        for run in api.runs(path, filters=wanted, order="-created_at", per_page=min(limit, 100)):
            found.append(run)
            if len(found) == limit:
                break
    except Error as error:
        click.echo(f"wbdist runs: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps([_facts(run) for run in found], default=str))
    elif not found:
        click.echo("no runs")
    else:
        _table(found)


def _facts(run: RunRecord) -> dict[str, Any]:
    return {
        "path": "/".join(run.path),
        "name": run.name,
        "state": run.state,
        "group": run.group,
        "job_type": run.job_type,
        "steps": run.lastHistoryStep + 1,
        "created_at": run.created_at,
        "url": run.url,
        "config": run.config,
        "summary": run.summary,
    }


def _table(found: list[RunRecord]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in ("name", "id", "state", "group", "job type", "steps", "created", "summary"):
        table.add_column(column, justify="right" if column == "steps" else "left")
    for run in found:
        table.add_row(
            run.name,
            run.id,
            run.state,
            run.group,
            run.job_type,
            str(run.lastHistoryStep + 1),
            run.created_at[:19],
            _summary(run),
        )
    Console(soft_wrap=True).print(table)


def _summary(run: RunRecord) -> str:
    numbers = {k: v for k, v in run.summary.items() if isinstance(v, int | float) and not k.startswith("_")}
    shown = [f"{key} {value:.4g}" for key, value in list(numbers.items())[:SHOWN_METRICS]]
    return ", ".join(shown) + (", ..." if len(numbers) > SHOWN_METRICS else "")


def _show(run: RunRecord, as_json: bool) -> None:
    attempts = run.attempts()
    if as_json:
        import msgspec

        click.echo(json.dumps({**_facts(run), "attempts": msgspec.to_builtins(attempts)}, default=str))
        return
    for label, value in _facts(run).items():
        click.echo(f"{label:<10} {json.dumps(value, default=str) if isinstance(value, dict) else value}")
    for attempt in attempts:
        ended = attempt.end_cause or "running"
        click.echo(
            f"attempt {attempt.attempt:<3} {attempt.cause or 'start':<10} from step {attempt.base_step + 1}, "
            f"{attempt.rows_live} of {attempt.rows} rows live, {ended}"
        )
