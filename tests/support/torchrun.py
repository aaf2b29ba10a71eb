"""A script under the real torchrun, to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.feeding import REPOSITORY


def torchrun(
    ranks: int,
    script: Path,
    *arguments: object,
    cwd: Path | None = None,
    options: tuple[str, ...] = ("--standalone",),
    exit_code: int = 0,
    timeout: float = 250.0,
) -> str:
    """What `ranks` ranks on this machine and torchrun printed, stdout first; fails with it when torchrun ended otherwise
    than with `exit_code` (it ends with 1 when a rank fails)."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options),
            *(str(script), *map(str, arguments)),
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == exit_code, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr
