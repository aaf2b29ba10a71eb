"""`wbdist doctor`: what would make a preemption, a save or a restart fail here, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
import msgspec

from wbdist.launch import doctor

MARKS = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}


@click.command("doctor", epilog="Example: wbdist doctor train.py --checkpoint-dir /scratch/ckpt")
@click.argument("scripts", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--checkpoint-dir", type=click.Path(path_type=Path), help="Where the checkpoints are to lie.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(scripts: tuple[Path, ...], checkpoint_dir: Path | None, as_json: bool) -> None:
    """Look for the traps of launching and preemption on this machine, and in SCRIPTS (Python files, batch scripts).

    Run it where the job is to run: inside the container, on the node, in the allocation. Changes nothing; takes seconds.
    Exit code 1 when there is a problem, 0 when there are warnings at most.
    """
    found = [finding for path in scripts for finding in doctor.script(path)]
    found += doctor.first_process() + doctor.slurm() + doctor.aws()
    found += doctor.directory(Path(os.environ.get("WANDB_DIR") or Path.cwd()))
    if checkpoint_dir is not None:
        found += doctor.directory(checkpoint_dir)
    found += doctor.clock(os.environ.get("WANDB_BASE_URL")) + doctor.names()
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(finding) for finding in found], indent=2))
    else:
        for finding in found:
            click.echo(f"{MARKS[finding.level]}{finding.check}: {finding.says}")
            if finding.fix:
                click.echo(f"        -> {finding.fix}")
        counts = [sum(finding.level == level for finding in found) for level in ("problem", "warning")]
        click.echo(f"\n{counts[0]} problem(s), {counts[1]} warning(s), {len(found)} findings")
    sys.exit(1 if any(finding.level == "problem" for finding in found) else 0)
