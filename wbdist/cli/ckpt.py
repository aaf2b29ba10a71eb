"""`wbdist ckpt`: what lies in a checkpoint directory, and whether it is whole. Needs no torch, except for `diff`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from wbdist.checkpoint import retention
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import Manifest, scan, verify
from wbdist.errors import CheckpointCorruptError, Error

DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def command() -> None:
    """List, verify, remove and compare the checkpoints of a job.

    \b
    Example:
      wbdist ckpt ls checkpoints/digits
    """


@command.command("ls")
@click.argument("directory", type=DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_checkpoints(directory: Path, as_json: bool) -> None:
    """List the committed checkpoints in DIRECTORY, newest first.

    Reads manifests only; `verify` reads the files. Exit code 1 when a manifest is damaged.

    \b
    Example:
      wbdist ckpt ls checkpoints/digits --json
    """
    good, broken = _scan(directory)
    if as_json:
        rows = [_row(manifest) for manifest in good]
        rows += [
            {"name": Path(bad.directory).name, "step": bad.step, "attempt": bad.attempt, "problem": bad.problem}
            for bad in broken
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        for manifest in good:
            when = datetime.fromtimestamp(manifest.created, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
            size = f"{manifest.bytes / 1e6:.1f} MB"
            about = f"{manifest.world_size} ranks  run {manifest.run.run_id}  {manifest.reason}"
            click.echo(f"{manifest.name:<20} {when}  {size:>12}  {about}")
        for bad in broken:
            click.echo(f"{Path(bad.directory).name:<20} damaged: {bad.problem}")
        if not good and not broken:
            click.echo(f"no checkpoints in {directory}")
    if broken:
        raise SystemExit(1)


@command.command("verify")
@click.argument("directory", type=DIRECTORY)
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def verify_checkpoints(directory: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Read every file of the checkpoints NAMES (all when none are given) in DIRECTORY and compare sizes and digests.

    Exit code 1 when one is damaged.

    \b
    Example:
      wbdist ckpt verify checkpoints/digits step-100.a1
    """
    good, broken = _scan(directory)
    known = {manifest.name: manifest for manifest in good}
    problems = {Path(bad.directory).name: bad.problem for bad in broken}
    for name in names:
        if name not in known and name not in problems:
            raise click.UsageError(f"there is no checkpoint {name!r} in {directory}; there are {sorted({*known, *problems})}")
    for name, manifest in known.items():
        if not names or name in names:
            try:
                verify(manifest)
            except CheckpointCorruptError as error:
                problems[name] = str(error)
    chosen = [name for name in [*known, *(n for n in problems if n not in known)] if not names or name in names]
    if as_json:
        click.echo(
            json.dumps(
                [{"name": name, "ok": name not in problems, "problem": problems.get(name, "")} for name in chosen], indent=2
            )
        )
    else:
        for name in chosen:
            click.echo(f"{name:<20} {problems.get(name, 'ok')}")
        if not chosen:
            click.echo(f"no checkpoints in {directory}")
    if any(name in problems for name in chosen):
        raise SystemExit(1)


@command.command("rm")
@click.argument("directory", type=DIRECTORY)
@click.argument("names", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON array of the removed names on stdout.")
@click.option("--force", is_flag=True, help="Also when no checkpoint would be left.")
def remove_checkpoints(directory: Path, names: tuple[str, ...], as_json: bool, force: bool) -> None:
    """Remove the checkpoints NAMES from DIRECTORY; refuses to remove the last one.

    \b
    Example:
      wbdist ckpt rm checkpoints/digits step-50.a1
    """
    good, _ = _scan(directory)
    chosen = [_find(good, directory, name) for name in names]
    if len(chosen) >= len(good) and not force:
        raise click.UsageError(f"this would leave no checkpoint in {directory}; add --force to do it")
    removed = [manifest.name for manifest in chosen if retention.remove(FileLayer(), manifest)]
    click.echo(json.dumps(removed) if as_json else "\n".join(f"removed {name}" for name in removed))
    if len(removed) < len(chosen):
        raise SystemExit(1)


@command.command("diff")
@click.argument("directory", type=DIRECTORY)
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON array of the differing parts on stdout.")
def compare_checkpoints(directory: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Say what differs between two checkpoints in DIRECTORY (the two newest unless NAMES are given), value by value.

    Tensors are compared bit by bit. Exit code 1 when something differs.

    \b
    Example:
      wbdist ckpt diff checkpoints/digits step-50.a1 step-100.a1
    """
    good, _ = _scan(directory)
    if len(names) not in {0, 2} or (not names and len(good) < 2):
        raise click.UsageError(f"two checkpoints are compared; {directory} has {[m.name for m in good]}")
    old, new = (_find(good, directory, name) for name in names) if names else (good[1], good[0])
    left, right = _values(old), _values(new)
    differing = [
        {"part": part, old.name: _short(left.get(part, "absent")), new.name: _short(right.get(part, "absent"))}
        for part in sorted({*left, *right})
        if part not in left or part not in right or left[part] != right[part]
    ]
    if as_json:
        click.echo(json.dumps(differing, indent=2))
    else:
        for row in differing:
            click.echo(f"{row['part']}: {row[old.name]} -> {row[new.name]}")
        if not differing:
            click.echo(f"{old.name} and {new.name} hold the same")
    if differing:
        raise SystemExit(1)


def _scan(directory: Path) -> tuple[list[Manifest], list[Any]]:
    try:
        return scan(directory)
    except Error as error:
        raise click.ClickException(str(error)) from error


def _find(good: list[Manifest], directory: Path, name: str) -> Manifest:
    for manifest in good:
        if manifest.name == name:
            return manifest
    raise click.UsageError(f"there is no committed checkpoint {name!r} in {directory}; there are {[m.name for m in good]}")


def _row(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "bytes": manifest.bytes,
        "world_size": manifest.world_size,
        "reason": manifest.reason,
        "run": manifest.run.run_id,
        "history_step": manifest.run.watermark.step,
        "config_hash": manifest.config_hash,
        "torch": manifest.torch,
        "shared": list(manifest.shared),
        "per_rank": list(manifest.per_rank),
    }


def _values(manifest: Manifest) -> dict[str, str]:
    """Every value of a checkpoint by its place: JSON of a plain value; type, shape and digest of a tensor."""
    import torch
    import xxhash

    from wbdist.checkpoint import tree
    from wbdist.checkpoint.commit import STATE
    from wbdist.checkpoint.storage import read_tensors

    found: dict[str, str] = {}
    for file in manifest.files:
        if not file.endswith("/" + STATE):
            continue
        directory = Path(manifest.directory) / file.removesuffix("/" + STATE)
        structures = tree.decode((directory / STATE).read_bytes())
        for name, tensor in read_tensors(directory, tree.template(structures)).items():
            bits = xxhash.xxh3_64_hexdigest(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            found[f"{directory.name}/{name}"] = f"{tensor.dtype} {list(tensor.shape)} {bits}"
        for name, structure in structures.items():
            _flatten(f"{directory.name}/{name}", structure, found)
    return found


def _flatten(place: str, structure: Any, found: dict[str, str]) -> None:
    items = structure.get("d", structure.get("o")) if isinstance(structure, dict) else None
    if items is not None:
        for key, value in items:
            _flatten(f"{place}.{key}", value, found)
    elif not (isinstance(structure, dict) and "T" in structure):
        found.setdefault(place, json.dumps(structure))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
