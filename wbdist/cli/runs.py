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

    Without PATH: the project of WANDB_PROJECT; when that is not set, the projects there are.
    """
    try:
        api = Api()
        if not path and not api.settings.project:
            _projects(api, as_json)
            return
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
        click.echo(f"no runs in project {path or api.settings.project} that match")
    else:
        _table(found)


def _projects(api: Api, as_json: bool) -> None:
    found = list(api.projects())
    if as_json:
        click.echo(json.dumps([{"path": "/".join(p.path), "created_at": p.created_at, "url": p.url} for p in found]))
    elif not found:
        click.echo(f"no projects yet on {api.base_url}")
    for project in found if not as_json else ():
        click.echo(f"{'/'.join(project.path):<30} {project.url}")


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

    columns = {
        "name": [run.name for run in found],
        "id": [run.id for run in found],
        "state": [run.state for run in found],
        "group": [run.group for run in found],
        "job type": [run.job_type for run in found],
        "steps": [str(run.lastHistoryStep + 1) for run in found],
        "created": [run.created_at[:19] for run in found],
        "summary": [_summary(run) for run in found],
    }
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table(show_edge=False, pad_edge=False)
    for title, cells in shown.items():
        # What is copied from here to another command is never cut, however narrow the terminal.
        least = max(map(len, cells)) if title in {"name", "id"} else None
        table.add_column(title, justify="right" if title == "steps" else "left", min_width=least)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
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
