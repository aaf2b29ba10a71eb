"""The files that W&B keeps with every run: config.yaml, wandb-summary.json, wandb-metadata.json, requirements.txt, and code.

Written once, at the end, into the run's `files`: cheap enough for the shortest run (a few small writes, no subprocess).
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from wbdist.protocol import jsonvalues
from wbdist.run import machine
from wbdist.run.values import plain

DIFF_SECONDS = 10.0
"""How long git may take for what is not committed."""


def write(directory: Path, config: Mapping[str, Any], summary: Mapping[str, Any], began: float, *, git: bool) -> list[str]:
    """Writes them into `directory`; their names. `began`: Unix seconds. Raises OSError."""
    contents = {
        "config.yaml": _config(config),
        "wandb-summary.json": jsonvalues.dumps(dict(summary)),
        "wandb-metadata.json": msgspec.json.format(msgspec.json.encode(plain(_metadata(began, git=git)))).decode(),
        "requirements.txt": "".join(f"{line}\n" for line in sorted(installed(), key=str.lower)),
    }
    for name, text in contents.items():
        (directory / name).write_text(text, encoding="utf-8")
    return list(contents)


def keep_main_script(directory: Path) -> str | None:
    """Copies the running script to `code/` in `directory`; its name there, None when there is no script. Raises OSError."""
    path: str | None = getattr(sys.modules.get("__main__"), "__file__", None)
    if not path or not Path(path).is_file():
        return None
    relative = os.path.relpath(path)
    name = Path("code", Path(path).name if relative.startswith("..") else relative).as_posix()
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return name


def keep_diff(directory: Path) -> str | None:
    """Writes what the checkout that we are in has changed since its commit to `diff.patch` in `directory`; its name, None where
    there is no checkout, no change or no git. Blocks for git, at most DIFF_SECONDS. Raises OSError."""
    checkout = machine.git(Path.cwd())
    if checkout is None:
        return None
    target = directory / "diff.patch"
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "-C", str(checkout.root), "diff", "--no-color", "--no-ext-diff", "HEAD"]
    with target.open("wb") as patch:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=patch,
                stderr=subprocess.DEVNULL,
                env=quiet,
                timeout=DIFF_SECONDS,
                check=False,
            )
            whole = done.returncode == 0
        except (FileNotFoundError, subprocess.TimeoutExpired):
            whole = False
    if whole and target.stat().st_size:
        return target.name
    target.unlink()
    return None


def installed() -> Iterator[str]:
    """`name==version` of every installed package: from the directories' names, a hundred times faster than their metadata."""
    seen = set()
    for place in sys.path:
        try:
            names = [path.name for path in Path(place or ".").iterdir()]
        except OSError:
            continue  # a zip file, or a directory that is gone
        for name in names:
            stem, dot, kind = name.rpartition(".")
            package, dash, version = stem.partition("-")
            if dot and dash and kind in {"dist-info", "egg-info"} and package not in seen:
                seen.add(package)
                yield f"{package}=={version.partition('-')[0]}"


def _metadata(began: float, *, git: bool) -> dict[str, Any]:
    facts = machine.environment()
    checkout = machine.git(Path.cwd()) if git else None
    facts["startedAt"] = datetime.fromtimestamp(began, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    if checkout is not None:
        facts["git"] = {"remote": checkout.remote, "commit": checkout.commit}
    return facts


def _config(config: Mapping[str, Any]) -> str:
    lines = [f"{_yaml(key)}:\n    value: {_yaml(value)}\n" for key, value in sorted(config.items())]
    return "".join(["wandb_version: 1\n", *lines])


def _yaml(value: Any) -> str:
    """A plain value as YAML 1.1 in one line: JSON, but for the numbers that YAML would take for words."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(str(key))}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        mantissa, e, exponent = repr(value).partition("e")
        if e:  # YAML 1.1 wants a point and a sign
            mantissa += "" if "." in mantissa else ".0"
            exponent = exponent if exponent[0] in "+-" else f"+{exponent}"
        return f"{mantissa}{e}{exponent}"
    return msgspec.json.encode(value).decode()
