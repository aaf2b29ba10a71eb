"""`wbdist server user` and `wbdist server project`: who else may use a server, and which projects all of them may read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wbdist.errors import Error, UsageError
from wbdist.protocol import names

if TYPE_CHECKING:
    from wbdist.server.keys import KeyRing

_data_dir = click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Default: $WBDIST_DATA_DIR or ~/.local/share/wbdist."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _change(data_dir: Path | None, change: Callable[[KeyRing], KeyRing]) -> None:
    """Errors as one line and their exit code."""
    from wbdist.server.keys import change_key_ring

    given = os.environ.get("WBDIST_DATA_DIR")
    folder = data_dir or (Path(given).expanduser() if given else Path.home() / ".local" / "share" / "wbdist")
    try:
        if not folder.is_dir():
            raise UsageError(f"{folder} does not exist: no server was ever started there; start one with `wbdist server`")
        change_key_ring(folder, change)
    except Error as error:
        click.echo(f"wbdist server: {error}", err=True)
        sys.exit(error.exit_code)


@click.group(epilog="Example: wbdist server user add alice --team vision")
def user() -> None:
    """Users beside the admin. Each has an entity of his own name, and is a member of the teams named."""


@user.command("add", epilog="Example: wbdist server user add alice --team vision > alice.key")
@click.argument("name")
@click.option(
    "--team", "teams", multiple=True, help="An entity that he is a member of; any number of times. Made on first use."
)
@_data_dir
@_as_json
def add(name: str, teams: tuple[str, ...], data_dir: Path | None, as_json: bool) -> None:
    """Make a user, or give one new teams and a new key (the old one ends); print his API key, alone. A running server knows it
    at once."""
    from wbdist.server import keys

    made = keys.new_key()

    def change(ring: KeyRing) -> KeyRing:
        for given in (name, *teams):
            names.entity(given)
        if name == "admin":
            raise UsageError("the admin is made with the server; `wbdist server key` prints his key")
        stored = keys.StoredKey(sha256=keys.digest(made), name=name, entity=name, teams=tuple(dict.fromkeys(teams)))
        return keys.KeyRing(ring.secret, [*(key for key in ring.keys if key.name != name), stored], ring.version, ring.public)

    _change(data_dir, change)
    click.echo(json.dumps({"name": name, "teams": list(teams), "key": made}) if as_json else made)


@user.command("rm", epilog="Example: wbdist server user rm alice")
@click.argument("name")
@_data_dir
def remove(name: str, data_dir: Path | None) -> None:
    """End a user's key and sessions. What he logged stays."""
    from wbdist.server import keys

    def change(ring: KeyRing) -> KeyRing:
        left = [key for key in ring.keys if key.name != name or key.admin]
        if len(left) == len(ring.keys):
            raise UsageError(f"there is no user {name!r} to remove; there are {', '.join(key.name for key in ring.keys)}")
        return keys.KeyRing(ring.secret, left, ring.version, ring.public)

    _change(data_dir, change)
    click.echo(f"removed {name}")


@user.command("ls", epilog="Example: wbdist server user ls --json")
@_data_dir
@_as_json
def show(data_dir: Path | None, as_json: bool) -> None:
    """List the users and their teams."""
    found: list[dict[str, object]] = []

    def look(ring: KeyRing) -> KeyRing:
        found.extend(
            {"name": key.name, "entity": key.entity, "teams": list(key.teams), "admin": key.admin} for key in ring.keys
        )
        return ring

    _change(data_dir, look)
    if as_json:
        click.echo(json.dumps(found))
        return
    for entry in found:
        click.echo("  ".join([str(entry["name"]), f"entity {entry['entity']}", *(f"team {t}" for t in list(entry["teams"]))]))  # type: ignore[call-overload]


@click.group(epilog="Example: wbdist server project public local/digits")
def project() -> None:
    """Which projects every user may read. Others are for the members of their entity alone."""


def _visibility(name: str, text: str, *, public: bool) -> None:
    @project.command(name, help=text, epilog=f"Example: wbdist server project {name} local/digits")
    @click.argument("path", metavar="ENTITY/PROJECT")
    @_data_dir
    def set_visibility(path: str, data_dir: Path | None) -> None:
        from wbdist.server import keys

        def change(ring: KeyRing) -> KeyRing:
            entity, _, project_name = path.partition("/")
            names.entity(entity)
            names.project(project_name)
            others = [known for known in ring.public if known != path]
            return keys.KeyRing(ring.secret, ring.keys, ring.version, tuple([*others, path] if public else others))

        _change(data_dir, change)
        click.echo(f"{path} is {name}")


_visibility("public", "Let every user of the server read a project; not where and how its code ran.", public=True)
_visibility("private", "Let only the members of its entity see a project, as it is for new ones.", public=False)
