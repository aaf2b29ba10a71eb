"""Which run `init` means, from `id`, `resume`, `fork_from` and `resume_from`: words only, no server is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import msgspec

from wbdist.core import branch as branches
from wbdist.core.branch import BranchPoint
from wbdist.errors import InvalidArgumentError, UsageError
from wbdist.protocol import names
from wbdist.run import autoresume, lifecycle
from wbdist.settings import Settings

Resume = Literal["", "allow", "must", "never"]
_WORDS = frozenset({"allow", "must", "never", "auto"})


class Choice(msgspec.Struct, frozen=True):
    run_id: str
    resume: Resume = ""
    auto: bool = False
    branch: BranchPoint | None = None
    id_is_given: bool = True

    @property
    def is_fork(self) -> bool:
        return self.branch is not None and self.branch.run_id != self.run_id


def choose(settings: Settings, project: str) -> Choice:
    """Raises UsageError (also a ValueError where W&B raises that) for what excludes each other or cannot be meant."""
    given = {name: value for name in ("resume", "fork_from", "resume_from") if (value := getattr(settings, name))}
    if len(given) > 1:
        raise InvalidArgumentError(f"at most one of resume, fork_from and resume_from can be given; got {_listed(given)}")
    run_id = names.run_id(settings.run_id) if settings.run_id is not None else None
    if settings.fork_from:
        point = _point("fork_from", settings.fork_from)
        if run_id == point.run_id:
            raise InvalidArgumentError(
                f"fork_from={settings.fork_from!r} and id={run_id!r} name the same run; a fork is a new run: leave `id` out or "
                "choose another (to go back in the run itself, use resume_from)"
            )
        return Choice(run_id or lifecycle.new_run_id(), branch=point, id_is_given=run_id is not None)
    if settings.resume_from:
        point = _point("resume_from", settings.resume_from)
        if run_id is not None and run_id != point.run_id:
            raise InvalidArgumentError(
                f"resume_from={settings.resume_from!r} goes back in run {point.run_id!r} and id={run_id!r} names another; "
                "leave `id` out (for a new run that begins there, use fork_from)"
            )
        return Choice(point.run_id, branch=point)
    if settings.resume:
        return _resumed(settings, settings.resume, run_id, project)
    if run_id is None:
        return Choice(lifecycle.new_run_id(), id_is_given=False)
    return Choice(run_id)


def _resumed(settings: Settings, resume: str, run_id: str | None, project: str) -> Choice:
    if resume not in _WORDS:
        meant = names.run_id(resume)
        if run_id not in {None, meant}:
            raise InvalidArgumentError(
                f"resume={resume!r} names one run and id={run_id!r} another; give the id once, with one of the words "
                "allow, must, never, auto"
            )
        return Choice(meant, "must")
    if resume == "auto":
        remembered = autoresume.read(Path(settings.root_dir) / "wandb", settings, project)
        if run_id is not None and remembered not in {None, run_id}:
            settings.say(f"id={run_id!r} is used; the file for resume=True names run {remembered!r}", warning=True)
        chosen = run_id or (names.run_id(remembered) if remembered else None)
        if chosen is None:
            return Choice(lifecycle.new_run_id(), auto=True, id_is_given=False)
        return Choice(chosen, "allow", auto=True)
    if run_id is None and resume == "must":
        raise UsageError('resume="must" needs the id of the run: init(id=..., resume="must"), or init(resume=<id>)')
    if run_id is None:
        return Choice(lifecycle.new_run_id(), id_is_given=False)
    return Choice(run_id, cast(Resume, resume))


def _point(argument: str, text: str) -> BranchPoint:
    try:
        point = branches.parse(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{argument}: {error}") from None
    names.run_id(point.run_id)
    return point


def _listed(given: dict[str, str]) -> str:
    return " and ".join(f"{name}={value!r}" for name, value in given.items())
