"""What may differ between the job that made a checkpoint and the one that is started from it.

What the script decides (its config, torch's switches) must be the same, or the history would join two trainings into one
line without a word: a difference is an error that names it, until somebody says that it is meant. What tells only where and
how wide the job runs (paths, ranks, workers, versions, machines) changes with every requeue; it is let through, and said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, Self

import msgspec
import xxhash

from wbdist.checkpoint.difference import config_values, differing
from wbdist.errors import ConfigError, UsageError

PLACES = ("*_dir", "*_path", "*_file", "*_root", "*_url", "dir", "path", "root", "url")
"""Last part of config keys that say where something lies."""
LAYOUT = (
    *("world_size", "rank", "local_rank", "local_world_size", "node_rank", "nnodes", "num_nodes", "nodes"),
    *("nproc", "nprocs", "nproc_per_node", "num_processes", "gpus", "num_gpus", "n_gpus", "device", "devices"),
    *("host", "hostname", "node", "port", "master_addr", "master_port", "pid", "job_id", "slurm_*", "resume"),
    *("workers", "num_workers", "prefetch_factor", "pin_memory", "persistent_workers"),
)
"""Last part of config keys that say on what the job runs. What a loader of ours yields does not depend on its workers."""
MACHINE = ("python", "torch", "numpy", "cuda", "machine", "devices", "threads")
"""Environment facts that a requeue changes by itself: another host, an image with newer packages. The state is read exactly
all the same; last bits of what is computed from it may differ."""

_PLACE = re.compile(r"(?:[/~]|\.{1,2}/|[a-z][a-z0-9+.-]*://)")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""In the text of a function or an object; no two processes have it alike."""
_ABSENT = "absent"


class Allowed(msgspec.Struct, frozen=True):
    """Which differences are meant: names, and patterns such as `optimizer.*`. A name stands for what is below it, too."""

    patterns: tuple[str, ...] = ()

    @classmethod
    def parse(cls, said: str | Iterable[str], what: str) -> Self:
        """`"error"` for none, `"allow"` for any, or names: a list, or one text with commas. Raises UsageError."""
        if isinstance(said, str):
            said = [name.strip() for name in said.split(",") if name.strip()]
            if said == ["error"]:
                return cls()
            if said == ["allow"]:
                return cls(("*",))
        names = tuple(said)
        if not all(names) or {"error", "allow"} & {*names}:
            raise UsageError(f'{what}={said!r} is not understood; give "error", "allow", or the names that may change')
        return cls(names)

    def admits(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in self.patterns)


class Change(msgspec.Struct, frozen=True):
    """One value that is not what it was; both sides as JSON, or `absent`."""

    name: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.now}"


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` in the form that is stored and compared: the same for the same values in every process."""
    return {str(key): _normal(value) for key, value in config.items()}


def _normal(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value) if isfinite(value) else str(value)  # JSON has no others
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else str(value)
    if isinstance(value, str):
        return _ADDRESS.sub("", value)
    if isinstance(value, Mapping):
        return normal(value)
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_normal(item) for item in value), key=json.dumps)
    return _normal(msgspec.to_builtins(value, str_keys=True, enc_hook=str))


def digest(config: Mapping[str, Any]) -> str:
    """Hash of a config in normal form."""
    return xxhash.xxh3_64_hexdigest(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


def check_config(name: str, config_hash: str, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Allowed) -> list[str]:
    """What is to be said of the configs of checkpoint `name` and of this job, both in normal form.

    Raises ConfigError naming each key that changed and is neither where or how wide the job runs nor `allowed`.
    """
    if digest(before) != config_hash:
        raise ConfigError(
            f"{name} does not hold the config that it was made with: the hash of what it holds is {digest(before)}, it "
            f"tells {config_hash or 'none'}. Use an older checkpoint, or start anew in another directory."
        )
    changes = _changes(config_values(dict(before), ""), config_values(dict(now), ""))
    if refused := _refused(changes, allowed):
        raise ConfigError(
            f"{name} was made with another config: {_listed(refused)}. Going on would put two trainings into one history. "
            f"Put the old values back; {_when_meant(refused)}; or start anew in another checkpoint directory."
        )
    return [f"the config has changed since {name}: {_listed(changes)}"] if changes else []


def set_later(start: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's config as it is `now`, in normal form, what the job was not started with; `start` in normal form."""
    return {key: value for key, value in normal(now).items() if key not in start or start[key] != value}


def check_later(name: str, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Allowed) -> None:
    """As `check_config`, for what was set in the run's config since the start, of which an attempt may not have set all yet.

    Raises ConfigError naming each key that both have, and not alike.
    """
    old, new = config_values(dict(before), ""), config_values(dict(now), "")
    changes = [change for change in _changes(old, new) if _ABSENT not in {change.before, change.now}]
    if refused := _refused(changes, allowed):
        raise ConfigError(
            f"{name} was made when the run's config was another: {_listed(refused)}. Going on would put two trainings into one "
            f"history. Set the old values again; {_when_meant(refused)}."
        )


def check_environment(name: str, before: Mapping[str, str], now: Mapping[str, str], allowed: Allowed) -> list[str]:
    """As `check_config`, for the facts of `environment.facts`. Raises ConfigError."""
    changes = _changes(dict(before), dict(now))
    refused = [change for change in changes if change.name not in MACHINE and not allowed.admits(change.name)]
    if refused:
        names = [change.name for change in refused]
        raise ConfigError(
            f"{name} was made in another environment: {_listed(refused)}. Training would not go on as it was. Start this job "
            f"as that one was; when the change is meant, say environment_changes={names!r} (or "
            f"WBDIST_ENVIRONMENT_CHANGES={','.join(names)}) until the next checkpoint stands."
        )
    return [f"the environment has changed since {name}: {_listed(changes)}"] if changes else []


def _changes(before: dict[str, str], now: dict[str, str]) -> list[Change]:
    return [Change(name, before.get(name, _ABSENT), now.get(name, _ABSENT)) for name in differing(before, now)]


def _listed(changes: list[Change]) -> str:
    return ", ".join(map(str, changes))


def _refused(changes: list[Change], allowed: Allowed) -> list[Change]:
    """Those of a config that neither say where or how wide the job runs, nor are `allowed`."""
    return [change for change in changes if not _is_layout(change) and not allowed.admits(change.name)]


def _when_meant(refused: list[Change]) -> str:
    names = [change.name for change in refused]
    return (
        f"when the change is meant, say config_changes={names!r} (or WBDIST_CONFIG_CHANGES={','.join(names)}) "
        "until the next checkpoint stands"
    )


def _is_layout(change: Change) -> bool:
    last = change.name.rpartition(".")[2].lower().replace("-", "_")
    if any(fnmatchcase(last, pattern) for pattern in (*PLACES, *LAYOUT)):
        return True
    sides = [json.loads(side) for side in (change.before, change.now) if side != _ABSENT]
    return len(sides) == 2 and all(isinstance(side, str) and _PLACE.match(side) for side in sides)
