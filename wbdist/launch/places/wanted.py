"""What a person wants to run, and what a place makes of it."""

from __future__ import annotations

import re
import shlex

import msgspec

from wbdist.errors import UsageError

FINAL = (65, 69)
"""Exit codes after which the same command must not be started again: failed for good, fenced."""
RESUMABLE = 75
"""The exit code that asks for another start: preempted, state saved."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One job, as it is on one machine."""

    script: str
    arguments: tuple[str, ...] = ()
    module: bool = False
    nproc: int = 1
    gpus: int = 0
    """GPUs for the whole job, 0 for none."""
    name: str = "train"
    """Letters, digits and dashes: a name that every place accepts."""
    grace: float = 110.0
    """Seconds from the notice until the ranks must be gone."""
    python: str = "python3"
    """The interpreter, where the job runs."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", self.name):
            raise UsageError(f"name {self.name!r}: use small letters, digits and dashes, at most 52 characters")

    def command(self, *where: str, on_preempt: str) -> list[str]:
        """The supervised job as a command line, for `exec`: a shell in between would keep the signals to itself. `where`: how
        the machines of one job find each other."""
        options = [*where, "--nproc", str(self.nproc), "--grace", f"{self.grace:g}", "--on-preempt", on_preempt]
        script = ["-m", self.script] if self.module else [self.script]
        return [self.python, "-m", "wbdist", "launch", *options, *script, *self.arguments]


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """Phase one of two: what would be submitted. Printed by --dry-run, or carried out."""

    text: str
    """The file that describes the job; '' where the command says it all."""
    filename: str
    """Its name in `launchers/`, and where {file} stands in `commands`."""
    commands: tuple[tuple[str, ...], ...]
    """What submits it, in order; `{file}` is the path of the text."""

    def render(self) -> str:
        """The text, and in comments what would be run with it."""
        lines = [shlex.join(word.replace("{file}", self.filename) for word in command) for command in self.commands]
        if not self.text:
            return "".join(f"{line}\n" for line in lines)
        return self.text + "".join(f"# submitted with: {line}\n" for line in lines)
