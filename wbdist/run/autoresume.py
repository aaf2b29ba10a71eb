"""`<root>/wandb-resume.json`: which run `resume=True` continues, W&B's file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from wbdist.settings import Settings

NAME = "wandb-resume.json"


class _File(msgspec.Struct, omit_defaults=True):
    run_id: str
    project: str = ""
    """Ours: so that another project's run that is started in the same directory is not taken for a continuation."""


def read(root: Path, settings: Settings, project: str) -> str | None:
    """The run id to continue; None without a file, or, which is said, with a damaged one (as in W&B) or another project's."""
    try:
        found = msgspec.json.decode((root / NAME).read_bytes(), type=_File)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        settings.say(f"{root / NAME} does not say which run to continue ({error}): a new one begins", warning=True)
        return None
    if found.project and found.project != project:
        settings.say(
            f"{root / NAME} is of project {found.project!r}: run {found.run_id} is not continued in project {project!r}",
            warning=True,
        )
        return None
    return found.run_id


def write(root: Path, project: str, run_id: str) -> None:
    """Atomic. Raises OSError."""
    fresh = root / f"{NAME}.{os.getpid()}"
    fresh.write_bytes(msgspec.json.encode(_File(run_id, project)))
    fresh.replace(root / NAME)


def forget(root: Path) -> None:
    """The run is finished, or another one has begun here: there is nothing to continue."""
    with contextlib.suppress(OSError):
        (root / NAME).unlink(missing_ok=True)
