"""`wbdist login`: keep an API key for a server."""

from __future__ import annotations

import sys

import click

from wbdist.errors import AuthenticationError, Error
from wbdist.run import backend, credentials
from wbdist.run.login import who
from wbdist.settings import resolve


@click.command("login", epilog="Example: wbdist login --host https://wandb.example.org   (asks for the key)")
@click.argument("key", required=False)
@click.option("--host", metavar="URL", help="The server. Default: WANDB_BASE_URL, else the embedded one.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Ask the server whether it accepts the key.")
@click.option("--relogin", is_flag=True, help="Replace a key that is kept already.")
def command(key: str | None, host: str | None, verify: bool, relogin: bool) -> None:
    """Keep an API KEY for a server in ~/.netrc, where `wbdist.init` and the wandb SDK find it.

    Leave KEY out to be asked for it, or give `-` to read it from standard input: on the command line others can see it.
    """
    try:
        server = backend.server_for(resolve(None, {"base_url": host} if host else {}))
        if server.embedded:
            click.echo(
                f"{server.base_url} is this machine's embedded server; its key lies in its data directory: no login needed"
            )
            return
        if key is None and server.api_key and not relogin:
            click.echo(f"a key for {server.base_url} is kept already; --relogin replaces it")
            return
        if key == "-":
            key = sys.stdin.readline()
        elif key is None:
            key = str(click.prompt(f"API key for {server.base_url}", hide_input=True))
        key = credentials.checked(key)
        name = ""
        if verify:
            viewer = who(server.base_url, key, 10.0)
            if viewer is None:
                raise AuthenticationError(f"{server.base_url} does not accept this key; nothing was kept")
            name = f" as {viewer.username or viewer.entity}"
        path = credentials.store(server.base_url, key)
    except Error as error:
        click.echo(f"wbdist login: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(f"logged in to {server.base_url}{name}; the key is kept in {path}")
