"""Config that lies in files: W&B's YAML, as `config="path"` and as defaults beside the script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wbdist.errors import UsageError

DEFAULTS = "config-defaults.yaml"
"""In the working directory: taken without being asked for, as in W&B."""


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a YAML file, `key: value` or W&B's `key: {value: ..., desc: ...}`. Raises UsageError naming the file."""
    import yaml  # type: ignore[import-untyped]  # here, since a script without such files should not pay for it

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, a 31st of June
        raise UsageError(f"config file {os.fspath(path)!r} cannot be read: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"config file {os.fspath(path)!r} must hold a mapping with names as keys, not {type(found).__name__}")
    return {
        key: value["value"] if isinstance(value, dict) and "value" in value and set(value) <= {"value", "desc"} else value
        for key, value in found.items()
        if key not in {"wandb_version", "_wandb"}
    }


def defaults(paths: tuple[str, ...]) -> dict[str, Any]:
    """The values of config-defaults.yaml, when there is one here, and over them those of `paths`, in order."""
    here = Path(DEFAULTS)
    values = load(here) if here.is_file() else {}
    for path in paths:
        values |= load(path)
    return values
