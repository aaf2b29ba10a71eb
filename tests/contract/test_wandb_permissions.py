"""What W&B's own SDK shows a user who may not do what he asks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")

INIT = """
import os
os.environ["WANDB_API_KEY"] = {key!r}
import wandb
try:
    run = wandb.init(project="p", entity={entity!r}, settings=wandb.Settings(init_timeout=30))
    print("STARTED", run.entity)
    run.finish()
except Exception as error:
    print("REFUSED", type(error).__name__, error)
"""


def test_three_refusals_reach_the_user(server: Any, sdk: Any) -> None:
    """Proves that wandb.init fails in three different words for a wrong key, an entity that there is not, and a project
    of others; and that the same user's own entity works."""

    def user(name: str, *more: str) -> str:
        command = [sys.executable, "-m", "wbdist.cli.server", "user", "add", name, *more, "--data-dir", str(server.data_dir)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    eve = user("eve")
    user("alice", "--team", "lab")
    missing = sdk.run(INIT.format(key=eve, entity="nowhere"))
    assert "REFUSED" in missing
    assert "'nowhere' does not exist" in missing
    foreign = sdk.run(INIT.format(key=eve, entity="lab"))
    assert "REFUSED" in foreign
    assert "may not write to project lab/p" in foreign
    unknown = sdk.run(INIT.format(key="x" * 40, entity=None))
    assert "REFUSED" in unknown
    assert "does not exist" not in unknown
    assert "may not write" not in unknown
    assert "STARTED eve" in sdk.run(INIT.format(key=eve, entity=None))
