"""Every setting, resolved once and then frozen.

Lowest to highest: the defaults here, the user's settings file, the project's settings file, `setup()`, the environment
(`WANDB_<NAME>`, and `WBDIST_<NAME>` which wins over it), arguments. Nothing reads the environment after `resolve`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from wbdist.core.wandb_settings import WithoutEffect
from wbdist.errors import UsageError

Mode = Literal["online", "offline", "disabled", "shared"]
Reinit = Literal["default", "create_new", "finish_previous", "return_previous"]
Console = Literal["auto", "wrap", "off"]


class Settings(WithoutEffect, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a run. Fields left out of a `Settings(...)` given to `init` keep what the lower sources say."""

    project: str | None = None
    """Default: the name of the git repository's directory, else `uncategorized`."""
    entity: str | None = None
    """User or team; None: the server's default for the key."""
    mode: Mode = "online"
    """`online` ships rows while they are logged, `offline` keeps them on disk for `wbdist sync`, `disabled` does nothing,
    `shared` is online as one of many writers of the run `run_id`: rows go by their step, the summary is of all of them."""
    base_url: str | None = None
    """The server. None: the embedded one of `data_dir`, started on demand."""
    api_key: str | None = None
    """None: ~/.netrc, or the embedded server's own key."""
    data_dir: str = ""
    """Where the embedded server and the shipper live. Default `~/.local/share/wbdist`."""
    root_dir: str = ""
    """Parent of the `wbdist/` directory with the runs' journals. Default: the working directory."""
    run_id: str | None = None
    run_name: str | None = None
    run_notes: str | None = None
    run_tags: tuple[str, ...] | None = None
    run_group: str | None = None
    run_job_type: str | None = None
    reinit: Reinit = "default"
    """What `init` does while a run is active. `default` is `finish_previous`, in notebooks `return_previous`."""
    resume: str | None = None
    """`allow`, `must`, `never`, `auto` (of the file of `root_dir`), or the id of a run that must exist; '' is none."""
    fork_from: str | None = None
    resume_from: str | None = None
    allow_val_change: bool = False
    """Config keys may be set to other values later. Notebooks always may."""
    sweep_id: str | None = None
    """The sweep that this run is a trial of. `id` is then the agent's, and so are `project` and `entity` when it says them:
    the script's are ignored with a word."""
    sweep_param_path: str | None = None
    """YAML file with the trial's parameters, which its agent wrote: they win over `config` and cannot be changed."""
    force: bool = False
    """Raise instead of going on with the journal alone when the server is away."""
    config_paths: tuple[str, ...] = ()
    """YAML files with defaults of the config, after `config-defaults.yaml` of the working directory."""
    artifact_dir: str = "artifacts"
    """Where artifacts are downloaded to, each into a directory of its own."""
    console: Console = "auto"
    """Whether what the process prints is kept with the run: `auto` and `wrap` do, `off` does not."""
    silent: bool = False
    """Print nothing at all."""
    quiet: bool = False
    """Print warnings only."""
    finish_timeout: float = 30.0
    """Seconds `finish` waits for the server to have everything; the rest is left to the shipper."""
    init_timeout: float = 15.0
    """Seconds `init` waits for the embedded server to come up; then the run goes on with its journal alone."""
    claim_timeout: float = 30.0
    """Seconds a job waits for an earlier one on the same checkpoint directory, which may be dying, to be gone."""
    notices: str = "auto"
    """Where a job hears that it must stop: `auto` finds out, `off` is signals only, or names such as `aws,file=/shared/stop`
    (docs/preemption.md)."""
    config_changes: str = "error"
    """What a job may be started with that its checkpoint was not made with: `error` is nothing, `allow` any config key, or
    names with commas between (docs/checkpoints.md)."""
    environment_changes: str = "error"
    """The same of torch's switches and the kind of device."""
    disable_git: bool = False
    """Do not look for a git commit and remote."""
    host: str | None = None
    """Name of this machine as shown; default: what the machine calls itself."""
    program: str | None = None
    """The script as shown; default: what `__main__` was loaded from."""
    x_label: str | None = None
    """Name of this writer among several of one run: its system metrics carry it."""
    x_primary: bool = True
    """Of several writers of one run, the one that says what the run is: its name, config, tags."""
    x_update_finish_state: bool = True
    """Whether the run ends when this writer does."""
    x_disable_stats: bool = False
    """No system metrics."""
    x_stats_sampling_interval: float = 15.0
    """Seconds between two samples of the system metrics; at least 0.1."""
    x_stats_disk_paths: tuple[str, ...] = ("/",)
    """Disks whose space and traffic are sampled."""
    x_stats_gpu_device_ids: tuple[int, ...] | None = None
    """GPUs to sample; None: all."""
    save_code: bool = False
    """Keep the running script with the run, and what its checkout has changed since its commit."""
    disable_code: bool = False
    """Keep no code, whatever `save_code` says."""
    ignore_globs: tuple[str, ...] = ()
    """Files of the run's directory that are not uploaded: patterns of their names in the run, such as `*.tmp`."""
    stop_fn: Any = None
    """Called without arguments, in a thread, when somebody asks on the server that the run stop, in place of the SIGINT."""
    start_method: str | None = None
    """Accepted as in W&B and ignored: there is no service process to start in one way or another."""

    def say(self, text: str, *, warning: bool = False) -> None:
        """Prints one line of ours on stderr, as `silent` and `quiet` allow."""
        if self.silent or (self.quiet and not warning):
            return
        with contextlib.suppress(OSError, ValueError):  # a closed stderr is no reason to fail
            print(f"wbdist: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def __post_init__(self) -> None:
        _check_values(
            {
                name: getattr(self, name)
                for name in (
                    "mode",
                    "reinit",
                    "console",
                    "finish_timeout",
                    "init_timeout",
                    "claim_timeout",
                    "x_stats_sampling_interval",
                )
            }
        )


SPECIAL_NAMES = {
    "dir": "root_dir",
    "name": "run_name",
    "notes": "run_notes",
    "tags": "run_tags",
    "job_type": "run_job_type",
}
"""`WANDB_<key>` -> setting, where W&B's variable is not called as its setting."""

OF_THE_TRIAL = {"project": "project", "entity": "entity", "run_id": "id"}
"""Settings that a sweep's agent decides -> what they are called as arguments."""

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""Variables by which launchers number ranks: who prints what all of them know."""

NOT_FROM_WANDB = frozenset({"data_dir"})
"""W&B's variable of this name means another directory."""

_ALLOWED: dict[str, tuple[str, ...]] = {
    "mode": ("online", "offline", "disabled", "shared"),
    "reinit": ("default", "create_new", "finish_previous", "return_previous"),
    "console": ("auto", "wrap", "off"),
}
_SYNONYMS: dict[str, dict[object, str]] = {
    "mode": {"run": "online", "dryrun": "offline"},
    "resume": {True: "auto", False: "", "true": "auto", "false": ""},
    "reinit": {True: "finish_previous", False: "return_previous", "true": "finish_previous", "false": "return_previous"},
    "console": {"wrap_raw": "wrap", "wrap_emu": "wrap", "redirect": "wrap"},
}
"""W&B's other words for the same thing."""


def _check_values(values: Mapping[str, Any], source: str = "") -> None:
    where = f" (from {source})" if source else ""
    for name, allowed in _ALLOWED.items():
        if name in values and values[name] not in allowed:
            raise UsageError(f"setting {name}={values[name]!r}{where} is not one of: {', '.join(allowed)}")
    for name in ("finish_timeout", "init_timeout", "claim_timeout"):
        if name in values and not (isinstance(values[name], int | float) and values[name] >= 0):
            raise UsageError(f"setting {name}={values[name]!r}{where} must be a number of seconds, 0 or more")
    interval = values.get("x_stats_sampling_interval", 1.0)
    if not (isinstance(interval, int | float) and interval >= 0.1):
        raise UsageError(f"setting x_stats_sampling_interval={interval!r}{where} must be a number of seconds, at least 0.1")


def field_names() -> tuple[str, ...]:
    return Settings.__struct_fields__


def default_data_dir(environ: Mapping[str, str] | None = None) -> Path:
    """`$WBDIST_DATA_DIR`, else `~/.local/share/wbdist`, as the `wbdist server` command has it."""
    env = os.environ if environ is None else environ
    if env.get("WBDIST_DATA_DIR"):
        return Path(env["WBDIST_DATA_DIR"]).expanduser().absolute()
    return Path("~/.local/share/wbdist").expanduser()


def from_arguments(given: Mapping[str, Any], source: str = "settings") -> dict[str, Any]:
    """Checked and converted values. Raises UsageError naming the setting and what is allowed."""
    values: dict[str, Any] = {}
    for said, value in given.items():
        # W&B's older form of its x_ settings begins with the underscore.
        name = f"x{said}" if said.startswith("_") and f"x{said}" in _FIELDS else said
        if name not in _FIELDS:
            known = sorted(set(_FIELDS) - set(WithoutEffect.__struct_fields__))
            raise UsageError(f"unknown setting {name!r} (from {source}); known are: {', '.join(known)}")
        values[name] = _convert(name, value, source)
    return values


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the environment says. Unknown names are left alone: they may belong to W&B or to other parts."""
    values: dict[str, Any] = {}
    for prefix in ("WANDB_", "WBDIST_"):
        for variable, text in environ.items():
            if not variable.startswith(prefix) or text == "":
                continue
            short = variable[len(prefix) :].lower()
            if short.startswith("_"):
                short = f"x{short}"  # W&B's other form of its x_ settings: WANDB__DISABLE_STATS
            name = SPECIAL_NAMES.get(short, short)
            if name in _FIELDS and not (prefix == "WANDB_" and name in NOT_FROM_WANDB):
                values[name] = _convert(name, text, variable)
    return values


def from_files(root_dir: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """The `[default]` sections of the user's and the project's settings files (W&B's, then ours, in each place)."""
    home = Path(environ.get("WANDB_CONFIG_DIR") or Path("~/.config/wandb").expanduser())
    ours = Path(environ.get("WBDIST_CONFIG_DIR") or Path("~/.config/wbdist").expanduser())
    values: dict[str, Any] = {}
    for path in (home / "settings", ours / "settings", root_dir / "wandb" / "settings", root_dir / "wbdist" / "settings"):
        if not path.is_file():
            continue
        from configparser import ConfigParser
        from configparser import Error as ParseError

        parser = ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (OSError, ParseError) as error:
            raise UsageError(f"settings file {path} cannot be read: {error}") from error
        if parser.has_section("default"):
            known = {name: text for name, text in parser["default"].items() if name in _FIELDS}
            values.update({name: _convert(name, text, str(path)) for name, text in known.items()})
    return values


_process_wide: dict[str, Any] = {}
_warned_start_method = False


def setup(settings: Settings | Mapping[str, Any] | None = None) -> None:
    """Sets defaults for every later `init` of this process; a field that is left out keeps its value. Not in step."""
    _process_wide.update(from_arguments(given_fields(settings), "setup()"))


def clear_setup() -> None:
    """Forgets what `setup` was told."""
    _process_wide.clear()


def given_fields(settings: Settings | Mapping[str, Any] | None) -> dict[str, Any]:
    """What a caller said: the items of a mapping, or the fields of a Settings that differ from the defaults."""
    if settings is None:
        return {}
    if isinstance(settings, Settings):
        return {n: getattr(settings, n) for n in field_names() if getattr(settings, n) != _DEFAULTS[n]}
    if isinstance(settings, Mapping):
        return dict(settings)
    raise UsageError(f"settings must be a wbdist.Settings or a dict, not {type(settings).__name__}")


def resolve(
    settings: Settings | Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    as_trial: bool = False,
) -> Settings:
    """All sources folded into one frozen value; `arguments` win over `settings`. Raises UsageError.

    Reads at most four small files and the environment, nothing else. With `as_trial`, a sweep's agent wins over the
    caller in what its trial's run is called and where it is (rank 0 says so).
    """
    env = os.environ if environ is None else environ
    of_environment = from_environment(env)
    of_caller = from_arguments(given_fields(settings)) | from_arguments(arguments or {}, "init()")
    below = {**_process_wide, **of_environment}
    ignored: list[str] = []
    if as_trial and below.get("sweep_id"):
        # All trials under an id of the script's would be one run.
        both = [name for name in OF_THE_TRIAL if name in of_caller and name in below]
        ignored = [f"{OF_THE_TRIAL[name]}={of_caller.pop(name)!r}" for name in both]
    above = {**below, **of_caller}
    root_dir = Path(above.get("root_dir") or ".").expanduser().absolute()
    values = {**from_files(root_dir, env), **above}
    values["root_dir"] = str(root_dir)
    data_dir = values.get("data_dir")
    values["data_dir"] = str(Path(data_dir).expanduser().absolute() if data_dir else default_data_dir(env))
    if values.get("base_url"):
        values["base_url"] = str(values["base_url"]).rstrip("/")
    resolved = Settings(**values)
    if ignored and all(env.get(name, "0") == "0" for name in RANKS):
        resolved.say(f"a trial of sweep {resolved.sweep_id} is what its agent says: {', '.join(ignored)} ignored", warning=True)
    return resolved


def _convert(name: str, value: Any, source: str) -> Any:
    synonyms = _SYNONYMS.get(name, {})
    if isinstance(value, str | bool) and (value.lower() if isinstance(value, str) else value) in synonyms:
        value = synonyms[value.lower() if isinstance(value, str) else value]
    if name in ("config_paths", "ignore_globs") and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    if name == "stop_fn" and not (value is None or callable(value)):
        raise UsageError(f"setting stop_fn={value!r} (from {source}) must be a function without arguments")
    if name == "run_tags" and isinstance(value, str):
        value = tuple(tag.strip() for tag in value.split(",") if tag.strip()) if source != "init()" else (value,)
    if name in ("x_stats_disk_paths", "x_stats_gpu_device_ids") and isinstance(value, str):
        value = tuple(part for part in value.replace(",", " ").split())
    if name in ("root_dir", "data_dir") and isinstance(value, os.PathLike):
        value = os.fspath(value)
    _check_values({name: value} if name in _ALLOWED else {}, source)
    try:
        converted = msgspec.convert(value, _FIELDS[name], strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"setting {name}={value!r} (from {source}) is not valid: {error}") from error
    _check_values({name: converted}, source)
    return converted


_FIELDS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings)}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(Settings)}
