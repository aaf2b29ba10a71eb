"""`wbdist server`: serve, and look after the server of a data directory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from wbdist.cli import server_gc, server_users
from wbdist.errors import DeadlineError, Error, UsageError

_STOP_TIMEOUT = 15.0
_NOT_RUNNING = 3
"""Exit code of `status` when nothing runs, as for init scripts."""


def default_data_dir() -> Path:
    """$WBDIST_DATA_DIR, else ~/.local/share/wbdist."""
    given = os.environ.get("WBDIST_DATA_DIR")
    return Path(given).expanduser() if given else Path.home() / ".local" / "share" / "wbdist"


@contextlib.contextmanager
def _errors_for_people() -> Iterator[None]:
    """Our errors as one line and their exit code; nobody needs a traceback to free a port."""
    try:
        yield
    except Error as error:
        click.echo(f"wbdist server: {error}", err=True)
        sys.exit(error.exit_code)


_data_dir = click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Default: $WBDIST_DATA_DIR or ~/.local/share/wbdist."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(
    "server", invoke_without_command=True, epilog="Example: wbdist server --data-dir ./runs --port 0 --port-file url.txt"
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one of this machine."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8420, show_default=True, help="0: any. Taken: the next free one."
)
@_data_dir
@click.option("--database", metavar="URL", help="SQLAlchemy URL. Default: SQLite in the data directory.")
@click.option("--files", metavar="URL", help="Folder for the runs' files. Default: in the data directory.")
@click.option("--port-file", type=click.Path(path_type=Path, dir_okay=False), help="Gets the URL when the server listens.")
@click.option(
    "--silence-timeout",
    type=click.FloatRange(min=0.1),
    default=300.0,
    show_default=True,
    help="Seconds without a sign of life after which a run counts as crashed, or preempted.",
)
@click.pass_context
def command(
    context: click.Context,
    *,
    host: str,
    port: int,
    data_dir: Path | None,
    database: str | None,
    files: str | None,
    port_file: Path | None,
    silence_timeout: float,
) -> None:
    """Serve runs, their history and their pages until Ctrl-C or SIGTERM. One server has a data directory at a time."""
    if context.invoked_subcommand is not None:
        return
    with _errors_for_people():
        # Only here: a client that merely asks for the key must not load the server.
        from wbdist.server.serve import Announcement, ServeOptions, serve
        from wbdist.server.settings import ServerSettings

        def announce(said: Announcement) -> None:
            if said.asked_port not in {0, said.port}:
                click.echo(f"port {said.asked_port} is taken; using {said.port}")
            click.echo(f"wbdist server at {said.url}")
            click.echo(f"  open   {said.login_url}   (logs one browser in, once)")
            click.echo(f"  key    wbdist server key --data-dir {said.data_dir}")
            click.echo(f"  data   {said.data_dir}")
            sys.stdout.flush()

        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        serve(
            ServeOptions(
                data_dir=(data_dir or default_data_dir()).absolute(),
                host=host,
                port=port,
                database=database,
                files=files,
                port_file=port_file,
                settings=ServerSettings(silence_timeout=silence_timeout),
            ),
            announce,
        )


@command.command(epilog="Example: export WANDB_API_KEY=$(wbdist server key)")
@_data_dir
@_as_json
def key(data_dir: Path | None, as_json: bool) -> None:
    """Print the admin's API key, alone."""
    folder = (data_dir or default_data_dir()).absolute()
    with _errors_for_people():
        try:
            found = (folder / "admin.key").read_text().strip()
        except FileNotFoundError:
            raise UsageError(
                f"{folder} has no admin.key: no server was ever started there; start one with `wbdist server`"
            ) from None
        except OSError as error:
            raise UsageError(f"cannot read {folder / 'admin.key'}: {error.strerror}") from None
    click.echo(json.dumps({"key": found}) if as_json else found)


command.add_command(server_users.user)
command.add_command(server_users.project)


@command.command(epilog="Example: wbdist server status --json")
@_data_dir
@_as_json
def status(data_dir: Path | None, as_json: bool) -> None:
    """Say whether a server runs on the data directory, and how to open it. Exit code 3: none."""
    from wbdist.server import datadir

    folder = (data_dir or default_data_dir()).absolute()
    pid = datadir.lock_holder(folder)
    address = datadir.read_address(folder) if pid is not None else None
    login = _login_url(folder, address.url) if address else None
    if as_json:
        facts = {"running": pid is not None, "data_dir": str(folder), "pid": pid, "login_url": login}
        more = {"url": address.url, "started_at": address.started_at, "version": address.version} if address else {"url": None}
        click.echo(json.dumps(facts | more))
    elif address is not None:
        click.echo(f"wbdist server at {address.url} (pid {address.pid}, version {address.version})")
        click.echo(f"  open   {login}   (logs one browser in, once)" if login else "  it does not answer")
        click.echo(f"  data   {folder}")
    elif pid is not None:
        click.echo(f"a server (pid {pid}) is starting or stopping on {folder}")
    else:
        click.echo(f"no server runs on {folder}")
    sys.exit(0 if pid is not None else _NOT_RUNNING)


@command.command(epilog="Example: wbdist server stop --data-dir ./runs")
@_data_dir
@_as_json
def stop(data_dir: Path | None, as_json: bool) -> None:
    """Stop the server of the data directory and wait until it is gone. Fine when none runs."""
    from wbdist.server import datadir

    folder = (data_dir or default_data_dir()).absolute()
    with _errors_for_people():
        # The holder of the lock, not the pid in server.json: that one may be long dead and its number reused.
        pid = datadir.lock_holder(folder)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + _STOP_TIMEOUT
            while datadir.lock_holder(folder) == pid:
                if time.monotonic() > deadline:
                    raise DeadlineError(f"the server (pid {pid}) on {folder} did not stop within {_STOP_TIMEOUT:.0f} s")
                time.sleep(0.02)
    if as_json:
        click.echo(json.dumps({"stopped": pid is not None, "pid": pid, "data_dir": str(folder)}))
    else:
        click.echo(f"stopped the server (pid {pid}) on {folder}" if pid else f"no server runs on {folder}")


@command.command(epilog="Example: wbdist server gc --dry-run")
@_data_dir
@click.option("--database", metavar="URL", help="As the server's.")
@click.option("--files", metavar="URL", help="As the server's.")
@click.option(
    "--older-than",
    "hours",
    default=24.0,
    show_default=True,
    help="Hours since a content was last received; 0 only without a server.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing, say what would go.")
@_as_json
def gc(*, data_dir: Path | None, database: str | None, files: str | None, hours: float, dry_run: bool, as_json: bool) -> None:
    """Free the space of files that no run and no artifact refers to, as those of deleted runs. Safe while the server works."""
    folder = (data_dir or default_data_dir()).absolute()
    server_gc.run(folder, database, files, hours, dry_run=dry_run, as_json=as_json)


def _login_url(folder: Path, url: str) -> str | None:
    """A fresh one-time address; None when the server does not answer or its key cannot be read."""
    import requests

    try:
        found = (folder / "admin.key").read_text().strip()
        answer = requests.post(f"{url}/api/ui/login-url", json={}, headers={"Authorization": f"Bearer {found}"}, timeout=5)
        answer.raise_for_status()
        return str(answer.json()["url"])
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    command(prog_name="wbdist server")
