"""A trial of a sweep: what W&B's agent tells the script that it starts, by the environment and a file beside it.

W&B's agent writes the parameters that it chose into a YAML file (`key: {value: ...}`) and names it, the sweep and the run in
WANDB_SWEEP_PARAM_PATH, WANDB_SWEEP_ID and WANDB_RUN_ID (`wandb/wandb_agent.py`, 0.31).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from wbdist.errors import UsageError
from wbdist.run import config_files
from wbdist.run.config import checked, merged

if TYPE_CHECKING:
    from wbdist.run.lifecycle import RunSpec
    from wbdist.settings import Settings


class Trial(msgspec.Struct, frozen=True):
    sweep_id: str = ""
    """Empty when there is a file alone: parameters of nobody's sweep."""
    parameters: dict[str, Any] = {}
    """They win over what the script says, and it cannot change them."""


def read(settings: Settings) -> Trial | None:
    """Any process, not in step: the trial that this process was started for, or None. Reads one small file.

    Raises UsageError for a sweep's id that cannot be one, and for a file that is not there or holds no parameters.
    """
    sweep_id, path = settings.sweep_id, settings.sweep_param_path
    if sweep_id is not None and (not sweep_id.strip() or sweep_id != sweep_id.strip()):
        raise UsageError(f"sweep_id={sweep_id!r} must not be empty and must not begin or end with white space")
    if not path:
        return None if sweep_id is None else Trial(sweep_id)
    try:
        parameters = checked(config_files.load(path))
    except (UsageError, TypeError) as error:
        raise UsageError(
            f"the parameters of this trial (WANDB_SWEEP_PARAM_PATH) cannot be read: {error}. A relative path is looked for in "
            f"{Path.cwd()}. Where nothing is a sweep's, unset WANDB_SWEEP_PARAM_PATH and WANDB_SWEEP_ID"
        ) from error
    return Trial(sweep_id or "", parameters)


def as_trial(spec: RunSpec, trial: Trial | None) -> RunSpec:
    """The spec of the run that is this trial's; as it was without one."""
    if trial is None:
        return spec
    return msgspec.structs.replace(
        spec, sweep=trial.sweep_id, config=merged(spec.config, trial.parameters), locked=trial.parameters
    )
