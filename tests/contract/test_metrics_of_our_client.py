"""What our client logs, read back with the real wandb SDK."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(server: Any, tmp_path: Path) -> Callable[[str], str]:
    """Runs a script that uses wbdist against the server, in a process of its own; gives what it printed."""

    def run(script: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "WANDB_BASE_URL": server.url,
                "WANDB_API_KEY": server.key,
                "WANDB_PROJECT": "p",
                "WANDB_RUN_ID": "ours",
                "WBDIST_QUIET": "true",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_defined_metrics(client: Callable[[str], str], sdk: Any) -> None:
    """Proves that the SDK reads our definitions, summary and completed rows as it reads its own."""
    client("""
        import wbdist as wandb
        with wandb.init() as run:
            run.define_metric("loss", step_metric="epoch", summary="min,mean")
            run.log({"epoch": 4})
            for value in (3, 1, 2):
                run.log({"loss": value})
    """)
    assert sdk.read("[api.run('p/ours').summary['loss'][name] for name in ('mean', 'min')]") == [2, 1]
    assert sdk.read("[(r['loss'], r['epoch']) for r in api.run('p/ours').scan_history(keys=['loss', 'epoch'])]") == [
        [3, 4],
        [1, 4],
        [2, 4],
    ]
    assert sdk.read("json.loads(api.run('p/ours').json_config)['_wandb']['value']['m']") == [
        {"1": "loss", "5": 2, "6": [1, 3], "7": [1, 3]},
        {"1": "epoch", "6": [], "7": []},
    ]
