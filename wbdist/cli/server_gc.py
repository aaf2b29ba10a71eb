"""`wbdist server gc`: free the space of contents that nothing refers to any more."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from wbdist.errors import Error, UsageError


def run(data_dir: Path, database: str | None, files: str | None, hours: float, *, dry_run: bool, as_json: bool) -> None:
    """Prints what was freed; a message and the error's exit code otherwise."""
    from wbdist.server import garbage
    from wbdist.server.files import FileStore
    from wbdist.server.serve import files_folder
    from wbdist.server.store import open_store

    try:
        if database is None and not (data_dir / "wbdist.db").exists():
            raise UsageError(f"{data_dir} has no wbdist.db: no server was ever started there")
        store = open_store(database or f"sqlite:///{data_dir / 'wbdist.db'}")
        try:
            place = FileStore(files_folder(data_dir, files))
            freed = garbage.collect(store, place, time.time() - hours * 3600, dry_run=dry_run)
        finally:
            store.close()
    except Error as error:
        click.echo(f"wbdist server: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps({"freed": freed.contents, "bytes": freed.bytes, "kept": freed.kept, "dry_run": dry_run}))
    else:
        verb = "would free" if dry_run else "freed"
        click.echo(f"{verb} {freed.contents} contents of {freed.bytes:,} bytes in all; {freed.kept} are in use or too young")
