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


def test_media_and_system_metrics(client: Callable[[str], str], sdk: Any) -> None:
    """Proves that the SDK's rows have our media records, that the files they name download whole, and that it reads our system
    metrics as its own."""
    client("""
        import time, numpy as np, wbdist as wandb
        with wandb.init(settings={"x_stats_sampling_interval": 0.1}) as run:
            run.log({"val/picture": wandb.Image(np.full((2, 3), 7)), "hist": np.arange(100.0)})
            run.log({"table": wandb.Table(columns=["a", "b"], data=[[1, "x"], [2, "y"]])})
            time.sleep(0.5)
    """)
    picture = sdk.read("next(iter(api.run('p/ours').scan_history(keys=['val/picture'])))['val/picture']")
    assert (picture["_type"], picture["width"], picture["height"]) == ("image-file", 3, 2)
    digest = (
        "__import__('hashlib').sha256(open(api.run('p/ours').file(%r).download(replace=True).name, 'rb').read()).hexdigest()"
    )
    assert sdk.read(digest % picture["path"]) == picture["sha256"]
    table = sdk.read("dict(api.run('p/ours').summary['table'])")
    assert (table["_type"], table["nrows"], sdk.read(digest % table["path"])) == ("table-file", 2, table["sha256"])
    assert sdk.read("len(next(iter(api.run('p/ours').scan_history(keys=['hist'])))['hist']['values'])") == 32
    events = sdk.read("api.run('p/ours').history(stream='events', pandas=False)")
    assert {"system.cpu", "system.memory_percent", "system.proc.memory.rssMB"} <= set(events[-1])


@pytest.mark.parametrize(
    ("again", "first_rows"), [('resume="must"', range(10)), ('resume_from="ours?_step=4"', range(5))], ids=["resume", "rewind"]
)
def test_aggregates_go_on(client: Callable[[str], str], sdk: Any, again: str, first_rows: range) -> None:
    """Proves that a run which is resumed or rewound, by a script that defines nothing again, continues min, mean, best and the
    step metric exactly where its history is cut."""
    client("""
        import wbdist as wandb
        with wandb.init() as run:
            run.define_metric("m/*", step_metric="epoch", summary="min,mean,best,last", goal="maximize")
            for i in range(10):
                run.log({"m/loss": 5 - i, "epoch": i // 2})
    """)
    client(f"""
        import wbdist as wandb
        with wandb.init({again}) as run:
            run.log({{"m/loss": 100}})
    """)
    values = [*(5 - i for i in first_rows), 100]
    assert sdk.read("dict(api.run('p/ours').summary['m/loss'])") == pytest.approx(
        {"min": min(values), "mean": sum(values) / len(values), "best": 100, "last": 100}
    )
    last = sdk.read("list(api.run('p/ours').scan_history(keys=['m/loss', 'epoch', '_step']))[-1]")
    assert last == {"m/loss": 100, "epoch": first_rows[-1] // 2, "_step": first_rows[-1] + 1}
