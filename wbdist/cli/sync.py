"""`wbdist sync`: bring journals to their server, once, in the foreground."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from wbdist.cli import feeds
from wbdist.errors import EXIT_FAILED_FOR_GOOD, EXIT_RETRYABLE, Error, UsageError
from wbdist.protocol import names
from wbdist.run import backend, credentials
from wbdist.run.journal import JournalHeader, find_journals
from wbdist.run.shipper.marks import mark, marked, settled
from wbdist.run.shipper.oneshot import Synced, Wanted, header_of, ship
from wbdist.run.shipper.remote import Remote
from wbdist.settings import resolve


@click.command("sync", epilog="Example: wbdist sync wandb/offline-run-20260102_030405-abc123")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--base-url", metavar="URL", help="The server. Default: the one each run was made for, else the configured one.")
@click.option("--id", "run_id", metavar="ID", help="Send it as the run of this id. Only for the journals of one run.")
@click.option("--project", "-p", metavar="NAME", help="Send into this project instead of the run's own.")
@click.option("--entity", "-e", metavar="NAME", help="Send to this user or team instead of the run's own.")
@click.option("--include-online/--skip-online", default=True, show_default=True, help="Runs that were online, too.")
@click.option("--include-offline/--skip-offline", default=True, show_default=True, help="Runs that were offline, too.")
@click.option("--include-synced/--skip-synced", default=True, show_default=True, help="Runs that are marked as sent, too.")
@click.option("--mark-synced/--no-mark-synced", default=True, show_default=True, help="Mark what is complete on the server.")
@click.option("--sync-all", is_flag=True, help="W&B's word for giving no PATH.")
@click.option("--skip-console", is_flag=True, help="Leave printed lines out.")
@click.option("--append", is_flag=True, help="Put the rows behind those of a run of this id that the server has already.")
@click.option("--replace-tags", metavar="OLD=NEW,...", help="Send these tags under other names.")
@click.option("--clean", is_flag=True, help="Remove the directories of runs that are then complete on the server.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds without progress after which a journal is left.")
@click.option(
    "--without-missing-ranks",
    is_flag=True,
    help="Of jobs lost with all their processes: go on without what ranks logged whose journals are not here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a journal.")
def command(
    *,
    paths: tuple[Path, ...],
    base_url: str | None,
    run_id: str | None,
    project: str | None,
    entity: str | None,
    include_online: bool,
    include_offline: bool,
    include_synced: bool,
    mark_synced: bool,
    sync_all: bool,
    skip_console: bool,
    append: bool,
    replace_tags: str | None,
    clean: bool,
    timeout: float,
    without_missing_ranks: bool,
    as_json: bool,
) -> None:
    """Send runs to their server: offline ones, and what a shipper could not deliver.

    PATH is a journal, a run directory, or a directory of runs; without one, ./wandb. Repeating it changes nothing: what
    the server has is not sent again. What the ranks of a job logged last, when it was lost with all its processes, is brought
    into its run first. Exit code 0: all is there; 70: something is not; 65: nothing to send at a PATH.
    """
    journals: list[Path] = []
    for path in (Path("wandb"),) if sync_all or not paths else paths:
        found = find_journals(path)
        if not found:
            click.echo(f"wbdist sync: no journal at {path}; give a run directory (wandb/run-...), or a .wbdj file", err=True)
            sys.exit(EXIT_FAILED_FOR_GOOD)
        journals += found
    chosen = [path.resolve() for path in journals if include_synced or not marked(path)]
    worst = 0
    try:
        replays, problems = feeds.replayed(chosen, without_missing=without_missing_ranks)
        chosen += replays
        worst = 2 if problems else 0
        names = _names(chosen, run_id, project, entity)
        wanted = Wanted(
            online=include_online,
            offline=include_offline,
            console=not skip_console,
            names=names,
            tags=_tags(replace_tags),
            append=append,
        )
        for result in ship(chosen, _remotes(base_url), timeout, logging.getLogger("wbdist.sync"), wanted):
            worst = max(worst, {"failed": 2, "fenced": 1}.get(result.outcome, 0))
            click.echo(_as_json(result) if as_json else _as_text(result))
            if result.outcome in {"complete", "fenced"} and mark_synced and not (names or skip_console):
                mark(result.journal, result.outcome, result.sent_to)
            elif not settled(result.journal):
                continue
            if clean and all(marked(path) or settled(path) for path in find_journals(result.journal.parent)):
                shutil.rmtree(result.journal.parent)
    except Error as error:
        click.echo(f"wbdist sync: {error}", err=True)
        sys.exit(error.exit_code)
    if worst == 2:
        sys.exit(EXIT_RETRYABLE)


def _names(journals: list[Path], run_id: str | None, project: str | None, entity: str | None) -> dict[str, str]:
    """Names to send under instead of the journals' own. Raises UsageError."""
    found = {}
    if project is not None:
        found["project"] = names.project(project)
    if entity is not None:
        found["entity"] = names.entity(entity)
    if run_id is not None:
        found["run_id"] = names.run_id(run_id)
        of = {header.run_id for path in journals if (header := header_of(path)) is not None}
        if len(of) > 1:
            raise UsageError(f"--id {run_id} is for the journals of one run; these are of {len(of)}: {', '.join(sorted(of))}")
    return found


def _tags(text: str | None) -> dict[str, str]:
    """`old1=new1,old2=new2`. Raises UsageError."""
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair]
    if any(not old or not new for old, _, new in pairs):
        raise UsageError(f"--replace-tags {text!r} is not understood; write OLD=NEW, several with commas in between")
    return {old: new for old, _, new in pairs}


def _remotes(base_url: str | None) -> Callable[[JournalHeader], Remote]:
    settings = resolve(None, {"base_url": base_url} if base_url else {})

    def remote_for(header: JournalHeader) -> Remote:
        if not base_url and header.base_url:
            home = header.data_dir or settings.data_dir
            embedded = bool(header.data_dir) or backend.running(Path(home)) == header.base_url
            key = credentials.find(msgspec.structs.replace(settings, data_dir=home), header.base_url, embedded=embedded)
            return Remote(header.base_url, key, header.data_dir)
        server = backend.server_for(settings)
        return Remote(server.base_url, server.api_key)

    return remote_for


def _as_json(result: Synced) -> str:
    header = result.header
    names = {} if header is None else {"run": header.run_id, "project": header.project, "attempt": header.attempt}
    return json.dumps({"journal": str(result.journal), **names, "outcome": result.outcome, "error": result.error})


def _as_text(result: Synced) -> str:
    header = result.header
    name = str(result.journal) if header is None else f"{header.project}/{header.run_id} attempt {header.attempt}"
    return f"{name}: {result.outcome}" + (f" ({result.error})" if result.error else "")
