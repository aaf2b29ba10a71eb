"""What `wbdist sync` sends, under which names, what it marks and removes; and `wbdist clean`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from wbdist.run.journal import Kind

ROOT = Path(__file__).resolve().parents[2]


def wbdist(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wbdist", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": "k" * 40}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)


def journal(wandb: Any, run_id: str, url: str = "", *, place: str = "", end: bool = True) -> Path:
    writer = wandb.journal(url, run_id=run_id, place=place)
    wandb.rows(writer, 0, 5)
    if end:
        writer.close(0)
    return Path(writer.path)


def test_what_is_sent(loopback: Any, wandb: Any) -> None:
    """Proves the choices: online or offline, marked or not; the old name of a directory makes no difference."""
    online = journal(wandb, "on", loopback.url)
    offline = journal(wandb, "off", place="dryrun-20200101_000000-off")
    done = wbdist("sync", "--base-url", loopback.url, "--skip-online", wandb.root)
    assert done.returncode == 0, done.stderr
    assert "p/off attempt 1: complete" in done.stdout
    assert "p/on attempt 1: skipped (an online run)" in done.stdout
    assert offline.with_name(offline.name + ".shipped").exists()
    assert not online.with_name(online.name + ".shipped").exists()
    before = len(loopback.requests)
    done = wbdist("sync", "--base-url", loopback.url, "--skip-online", "--skip-synced", wandb.root)
    assert (done.returncode, len(loopback.requests)) == (0, before)
    journal(wandb, "more")
    done = wbdist("sync", "--base-url", loopback.url, "--no-mark-synced", "--skip-online", wandb.root)
    assert "p/more attempt 1: " in done.stdout
    assert not list(wandb.root.glob("run-more-1/*.shipped"))


def test_under_which_names(loopback: Any, wandb: Any) -> None:
    """Proves that a run can be sent under another id, project and entity, without its console, and is then not marked."""
    writer = wandb.journal(run_id="mine")
    wandb.rows(writer, 0, 5)
    writer.append(Kind.CONSOLE, {"text": "t", "stream": "stdout"})
    writer.close(0)
    done = wbdist(
        "sync", "--base-url", loopback.url, "--id", "a b", "-p", "other", "-e", "team", "--skip-console", writer.path.parent
    )
    assert done.returncode == 0, done.stderr
    assert any(path == "/files/team/other/a-b/file_stream" for path, _ in loopback.requests)
    assert len(loopback.history()) == 5
    assert loopback.lines.get((1, "rank0", "output.log"), []) == []
    assert not list(wandb.root.glob("*/*.shipped"))
    journal(wandb, "second")
    done = wbdist("sync", "--base-url", loopback.url, "--id", "x", wandb.root)
    assert (done.returncode, "journals of one run; these are of 2: mine, second" in done.stderr) == (65, True)


def test_what_is_removed(loopback: Any, wandb: Any, tmp_path: Path) -> None:
    """Proves that --clean and `wbdist clean` remove what is complete on the server and old enough, and never a living run."""
    first, second, third = (journal(wandb, name) for name in ("one", "two", "three"))
    alive = journal(wandb, "alive", end=False)
    assert wbdist("sync", "--base-url", loopback.url, "--clean", first.parent).returncode == 0
    assert not first.parent.exists()
    assert wbdist("sync", "--base-url", loopback.url, second.parent).returncode == 0
    assert "nothing to remove" in wbdist("clean", wandb.root).stdout, "it is not a day old"
    done = wbdist("clean", "--min-hours", "0", "--force", wandb.root)
    assert done.stdout.split() == [str(second.parent)]
    assert (second.parent.exists(), third.parent.exists()) == (False, True)
    done = wbdist("clean", "--min-hours", "0", "--force", "--include-unsynced", wandb.root)
    assert (third.parent.exists(), alive.parent.exists()) == (False, True)
    assert wbdist("clean", tmp_path / "nothing").returncode == 65
