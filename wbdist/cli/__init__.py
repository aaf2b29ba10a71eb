"""The command line: one file a command, loaded when it is called."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import click

COMMANDS = ("server", "launch", "submit", "runs", "attempts", "audit", "sync", "clean", "ckpt", "login", "chaos", "doctor")
"""In the order of `wbdist --help`. Each is `command` in `wbdist.cli.<name>`; one whose module is missing is not listed."""


class LazyGroup(click.Group):
    """Imports a command's module only to run it: `wbdist server` must not load what `wbdist launch` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return [name for name in COMMANDS if find_spec(f"wbdist.cli.{name}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        found = import_module(f"wbdist.cli.{cmd_name}").command
        assert isinstance(found, click.Command), f"wbdist.cli.{cmd_name}.command is not a click command"
        return found


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="wbdist", prog_name="wbdist")
def main() -> None:
    """Tracked, resumable, preemption-tolerant PyTorch jobs.

    \b
    Example:
      wbdist launch --nproc 2 train.py
      wbdist runs my-project
    """
