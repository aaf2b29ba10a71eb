"""`wbdist ckpt`: what checkpoints there are, and whether they are whole. Needs no torch, except for `diff`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import xxhash

from wbdist.checkpoint.manifest import Broken, Manifest
from wbdist.checkpoint.places import place
from wbdist.core.goodput import duration
from wbdist.errors import CheckpointCorruptError, Error

COLUMNS = ("checkpoint", "step", "attempt", "age", "size", "ranks", "run", "rows to step", "saved for", "verdict")
_NUMBERS = frozenset({"step", "attempt", "size", "ranks", "rows to step"})


@click.group()
def command() -> None:
    """List, verify, remove and compare the checkpoints of a job, in a directory or on an object store.

    \b
    Example:
      wbdist ckpt ls checkpoints/digits
      wbdist ckpt ls s3://bucket/jobs/digits
    """


@command.command("ls")
@click.argument("where", metavar="DIRECTORY|URL")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_checkpoints(where: str, as_json: bool) -> None:
    """List the committed checkpoints, newest first.

    Reads manifests and file sizes only; `verify` reads the files. `rows to step` is where the run's history stood. Exit code
    1 when something is missing or damaged.

    \b
    Example:
      wbdist ckpt ls checkpoints/digits --json
    """
    with _told():
        found = place(where)
        good, broken = found.scan()
        rows = [_row(manifest, found.missing(manifest)) for manifest in good]
        rows += [_broken_row(bad) for bad in broken]
        beside = [("quarantined", found.put_away()), ("unfinished", found.unfinished())]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        if rows:
            _table([COLUMNS, *(_cells(row) for row in rows)])
        else:
            click.echo(f"no checkpoints in {where}")
        for what, names in beside:
            if names:
                click.echo(f"{what}: {', '.join(names)}")
    if any(row["problem"] for row in rows):
        raise SystemExit(1)


@command.command("verify")
@click.argument("where", metavar="DIRECTORY|URL")
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def verify_checkpoints(where: str, names: tuple[str, ...], as_json: bool) -> None:
    """Read every file of the checkpoints NAMES (all when none are given) and compare sizes and digests.

    Exit code 1 when one is damaged.

    \b
    Example:
      wbdist ckpt verify checkpoints/digits step-100.a1
    """
    with _told():
        found = place(where)
        good, broken = found.scan()
        problems = {Path(bad.directory).name: bad.problem for bad in broken}
        there = [*(manifest.name for manifest in good), *problems]
        for name in names:
            if name not in there:
                raise click.UsageError(f"there is no checkpoint {name!r} in {where}; there are {sorted(there)}")
        chosen = [name for name in there if not names or name in names]
        for manifest in good:
            if manifest.name in chosen:
                try:
                    found.verify(manifest)
                except CheckpointCorruptError as error:
                    problems[manifest.name] = str(error)
    if as_json:
        verdicts = [{"name": name, "ok": name not in problems, "problem": problems.get(name, "")} for name in chosen]
        click.echo(json.dumps(verdicts, indent=2))
    else:
        for name in chosen:
            click.echo(f"{name:<20} {problems.get(name, 'ok')}")
        if not chosen:
            click.echo(f"no checkpoints in {where}")
    if any(name in problems for name in chosen):
        raise SystemExit(1)


@command.command("rm")
@click.argument("where", metavar="DIRECTORY|URL")
@click.argument("names", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON array of the removed names on stdout.")
@click.option("--force", is_flag=True, help="Also when no checkpoint would be left.")
def remove_checkpoints(where: str, names: tuple[str, ...], as_json: bool, force: bool) -> None:
    """Remove the checkpoints NAMES.

    Refuses those that a living job needs: the one it started from, and the newest. Refuses to remove the last ones; stop
    the job, and add --force, if that is meant.

    \b
    Example:
      wbdist ckpt rm checkpoints/digits step-50.a1
    """
    with _told():
        found = place(where)
        good, _ = found.scan()
        chosen = [_find(good, where, name) for name in dict.fromkeys(names)]
        needed = found.in_use()
        for manifest in chosen:
            if manifest.name in needed:
                raise click.UsageError(f"{manifest.name} is in use: {needed[manifest.name]}; stop that job first")
        if len(chosen) >= len(good) and not force:
            raise click.UsageError(f"this would leave no checkpoint in {where}; add --force to do it")
        removed = [manifest.name for manifest in chosen if found.remove(manifest)]
    click.echo(json.dumps(removed) if as_json else "\n".join(f"removed {name}" for name in removed))
    if len(removed) < len(chosen):
        raise SystemExit(1)


@command.command("diff")
@click.argument("where", metavar="DIRECTORY|URL")
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON array of the differing parts on stdout.")
def compare_checkpoints(where: str, names: tuple[str, ...], as_json: bool) -> None:
    """Say what differs between two checkpoints (the two newest unless NAMES are given), value by value.

    Tensors are compared bit by bit, and shown by type, shape and digest; the config that the job was started with key by key.
    Exit code 1 when something differs.

    \b
    Example:
      wbdist ckpt diff checkpoints/digits step-50.a1 step-100.a1
    """
    from wbdist.checkpoint.difference import differing, values

    with _told():
        found = place(where)
        good, _ = found.scan()
        if len(names) not in {0, 2} or (not names and len(good) < 2):
            raise click.UsageError(f"two checkpoints are compared; {where} has {[m.name for m in good]}")
        old, new = (_find(good, where, name) for name in names) if names else (good[1], good[0])
        with found.at_hand(old) as left_files, found.at_hand(new) as right_files:
            left, right = values(old, left_files), values(new, right_files)
    parts = differing(left, right)
    if as_json:
        rows = [{"part": part, old.name: left.get(part, "absent"), new.name: right.get(part, "absent")} for part in parts]
        click.echo(json.dumps(rows, indent=2))
    else:
        if parts:
            _table(
                [
                    ("part", old.name, new.name),
                    *((part, _short(left.get(part, "absent")), _short(right.get(part, "absent"))) for part in parts),
                ]
            )
        same = len({*left, *right}) - len(parts)
        click.echo(
            f"\n{len(parts)} values differ, {same} are the same" if parts else f"{old.name} and {new.name} hold the same"
        )
    if parts:
        raise SystemExit(1)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Error as error:
        click.echo(f"wbdist ckpt: {error}", err=True)
        raise SystemExit(error.exit_code) from error


def _find(good: list[Manifest], where: str, name: str) -> Manifest:
    for manifest in good:
        if manifest.name == name:
            return manifest
    raise click.UsageError(f"there is no committed checkpoint {name!r} in {where}; there are {[m.name for m in good]}")


def _row(manifest: Manifest, problems: list[str]) -> dict[str, Any]:
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
        "config": manifest.config,
        "config_hash": manifest.config_hash,
        "torch": manifest.torch,
        "host": manifest.host,
        "shared": list(manifest.shared),
        "per_rank": list(manifest.per_rank),
        "problem": "; ".join(problems),
    }


def _broken_row(bad: Broken) -> dict[str, Any]:
    return {"name": Path(bad.directory).name, "step": bad.step, "attempt": bad.attempt, "problem": bad.problem}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "created" not in row:
        return (row["name"], str(row["step"]), str(row["attempt"]), "", "", "", "", "", "", f"damaged: {row['problem']}")
    return (
        row["name"],
        str(row["step"]),
        str(row["attempt"]),
        duration(max(0.0, time.time() - row["created"])),
        size(row["bytes"]),
        str(row["world_size"]),
        row["run"],
        str(row["history_step"]),
        row["reason"],
        f"damaged: {row['problem']}" if row["problem"] else "whole",
    )


def size(count: int) -> str:
    """`512 B`, `1.4 kB`, `2.4 GB`."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def _table(rows: list[tuple[str, ...]]) -> None:
    # By hand: a terminal's table cuts what does not fit, and this is also read in files and through pipes.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for name, cell, width in zip(rows[0], row, widths, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _short(text: str) -> str:
    """Long values by their beginning and a digest, or two that differ at their ends would look alike."""
    return text if len(text) <= 48 else f"{text[:36]}... #{xxhash.xxh3_64_hexdigest(text.encode())[:7]}"
