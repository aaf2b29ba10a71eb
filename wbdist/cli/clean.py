"""`wbdist clean`: remove the directories of runs that are on their server."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from time import time

import click

from wbdist.errors import EXIT_FAILED_FOR_GOOD
from wbdist.run.journal import find_journals, writer_alive
from wbdist.run.shipper.marks import marked, settled


@click.command("clean", epilog="Example: wbdist clean --min-hours 0 wandb")
@click.argument("root", default="wandb", type=click.Path(path_type=Path, file_okay=False))
@click.option("--min-hours", default=24.0, show_default=True, help="Leave runs that were written to in the last hours.")
@click.option("--include-unsynced", is_flag=True, help="Also runs that their server does not have: they are then lost.")
@click.option("--force", is_flag=True, help="Do not ask.")
def command(root: Path, min_hours: float, include_unsynced: bool, force: bool) -> None:
    """Remove run directories below ROOT that are complete on their server, by the shipper's or `wbdist sync`'s word.

    So are ranks' own journals all of which is in their run. Runs that are being written are never touched. Exit code 65: ROOT
    does not exist.
    """
    if not root.is_dir():
        click.echo(f"wbdist clean: {root} does not exist; give the directory that holds the run-... directories", err=True)
        sys.exit(EXIT_FAILED_FOR_GOOD)
    chosen = removable(root, time() - min_hours * 3600, include_unsynced=include_unsynced)
    for directory in chosen:
        click.echo(str(directory))
    if not chosen:
        click.echo("nothing to remove")
        return
    if force or click.confirm(f"Remove {len(chosen)} run directories?"):
        for directory in chosen:
            shutil.rmtree(directory)


def removable(root: Path, before: float, *, include_unsynced: bool) -> list[Path]:
    """Run directories of `root` without a living writer, last written before `before` (Unix seconds), shipped unless told."""
    directories = sorted({path.parent for path in find_journals(root) if path.parent != root})
    found = []
    for directory in directories:
        journals = find_journals(directory)
        shipped = include_unsynced or all(marked(path) or settled(path) for path in journals)
        if shipped and not any(writer_alive(path) or path.stat().st_mtime > before for path in journals):
            found.append(directory)
    return found
