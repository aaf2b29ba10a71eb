"""`wbdist ckpt`: what it prints and the code it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.ranks import alone
from support.training import Training, position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.claim import Attempt, JobIdentity
from wbdist.checkpoint.copies import Copies
from wbdist.checkpoint.manifest import committed
from wbdist.cli.ckpt import command


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three checkpoints, of steps 2, 3 and 4."""
    training = Training(alone(), tmp_path / "ckpt", keep_last=3)
    training.track()
    training.train(4, save_at=(2, 3, 4))
    training.checkpoints.close()
    return tmp_path / "ckpt"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_ls_and_verify(directory: Path) -> None:
    """Both list newest first, as text and as JSON; damage is named and is exit code 1."""
    code, output = run("ls", directory, "--json")
    assert (code, [row["step"] for row in json.loads(output)]) == (0, [4, 3, 2])
    lines = run("ls", directory)[1].splitlines()
    assert lines[0].split()[:5] == ["checkpoint", "step", "attempt", "age", "size"]
    assert lines[1].split()[:3] == ["step-4.a1", "4", "1"]
    assert lines[1].split()[-4:] == ["1", "r1", "3", "whole"]
    assert run("verify", directory)[0] == 0
    (directory / "step-3.a1" / "shared" / "state.json").write_bytes(b"{}")
    (directory / "step-2.a1" / "manifest.json").write_bytes(b"{}")
    code, output = run("verify", directory, "--json")
    verdicts = {row["name"]: row["problem"] for row in json.loads(output)}
    assert code == 1
    assert verdicts["step-4.a1"] == ""
    assert "shared/state.json has 2 bytes" in verdicts["step-3.a1"]
    assert "not a manifest" in verdicts["step-2.a1"]
    assert run("verify", directory, "step-4.a1") == (0, "step-4.a1            ok\n")
    (directory / "step-1.a1.tmp").mkdir()
    code, output = run("ls", directory)
    assert code == 1
    assert "damaged: shared/state.json has 2 bytes" in output
    assert output.endswith("unfinished: step-1.a1.tmp\n")


def test_rm(directory: Path) -> None:
    """Removes what it is told, names what there is otherwise, and keeps the last one unless forced."""
    assert run("rm", directory, "step-2.a1", "--json") == (0, '["step-2.a1"]\n')
    code, output = run("rm", directory, "step-9.a1")
    assert code == 2
    assert "['step-4.a1', 'step-3.a1']" in output
    assert run("rm", directory, "step-3.a1", "step-4.a1")[0] == 2
    assert run("rm", directory, "step-3.a1", "step-4.a1", "--force")[0] == 0
    assert list(directory.iterdir()) == []


def test_rm_spares_a_living_job(tmp_path: Path) -> None:
    """What it started from and the newest stay, even by force, until it is gone; a dead job's lock file holds nothing."""
    directory = tmp_path / "ckpt"

    def save(attempt: int, *steps: int) -> None:
        with Checkpointer(directory, alone(), attempt=attempt, keep_last=9) as checkpoints:
            for step in steps:
                checkpoints.save(step, position(step, attempt), block=True, timeout=20)

    save(1, 1, 2)
    script = (
        "import sys; from pathlib import Path; from wbdist.checkpoint.claim import Claim\n"
        "Claim.take(Path(sys.argv[1]), run_id=None, project='p', entity='e', name=None)\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", script, str(directory)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        assert living.stdin is not None
        assert living.stdout.readline() == "held\n"
        save(2, 3, 4)
        for force in ((), ("--force",)):
            code, output = run("rm", directory, "step-2.a1", *force)
            assert code == 2
            assert "step-2.a1 is in use: the job pid" in output
            assert "attempt 2 started from it; stop that job first" in " ".join(output.replace("│", " ").split())
            assert run("rm", directory, "step-3.a2", "step-4.a2", *force)[0] == 2
        assert len(committed(directory)) == 4
        assert run("rm", directory, "step-1.a1", "step-3.a2") == (0, "removed step-1.a1\nremoved step-3.a2\n")
        living.stdin.close()
        assert living.wait(60) == 0
    assert run("rm", directory, "step-4.a2", "step-2.a1")[0] == 2
    assert run("rm", directory, "step-4.a2", "step-4.a2")[0] == 0
    assert run("rm", directory, "step-2.a1", "--force")[0] == 0
    assert committed(directory) == []


def test_diff(directory: Path) -> None:
    """Tells every value that differs; a checkpoint does not differ from itself."""
    code, output = run("diff", directory, "--json")
    parts = {row["part"]: row for row in json.loads(output)}
    assert code == 1
    assert parts["shared/data.consumed"] == {"part": "shared/data.consumed", "step-3.a1": "12", "step-4.a1": "16"}
    assert {"shared/model.0.weight", "shared/optimizer.state.0.exp_avg", "rank-0/rng.torch", "rank-0/rng.python"} <= set(parts)
    assert "shared/data.seed" not in parts
    assert run("diff", directory, "step-3.a1", "step-3.a1") == (0, "step-3.a1 and step-3.a1 hold the same\n")


def test_diff_names_config_keys(tmp_path: Path) -> None:
    """Config keys that changed between two attempts are named, nested ones too, by diff and by the restore."""
    for attempt, config in ((1, {"lr": 0.1, "net": {"depth": 2}}), (2, {"lr": 0.2, "net": {"depth": 2, "width": 8}})):
        model = torch.nn.Linear(2, 2)
        with Checkpointer(tmp_path, alone(), attempt=attempt, config=config, config_changes="allow") as checkpoints:
            checkpoints.track(model=model)
            restored = checkpoints.restore(timeout=20)
            checkpoints.save(attempt, position(attempt, attempt), block=True, timeout=20)
    assert restored is not None
    assert restored.notes == ("the config has changed since step-1.a1: lr 0.1 -> 0.2, net.width absent -> 8",)
    parts = {row["part"] for row in json.loads(run("diff", tmp_path, "--json")[1]) if row["part"].startswith("config")}
    assert parts == {"config.lr", "config.net.width"}


def test_on_an_object_store(directory: Path) -> None:
    """The same commands on a store's address, here a directory's; damage there is told."""
    url = f"file://{directory.parent / 'store'}"
    copies = Copies(url)
    copies.begin(JobIdentity("r1", "p", "e", None, 0.0), Attempt(1, "n", 0.0, "h", 1, "start"), ())
    for manifest in committed(directory):
        copies.ship(manifest, Path(manifest.directory), 1)
    here, there = (json.loads(run("ls", where, "--json")[1]) for where in (directory, url))
    assert here == there
    assert run("verify", url) == run("verify", directory)
    assert run("diff", url) == run("diff", directory)
    assert run("rm", url, "step-2.a1") == (0, "removed step-2.a1\n")
    (directory.parent / "store" / "step-3.a1" / "shared" / "state.json").write_bytes(b"{}")
    assert run("ls", url)[0] == 1
    assert "shared/state.json has 2 bytes" in run("verify", url)[1]
    code, output = run("ls", directory / "nowhere")
    assert code == 65
    assert "is not a directory" in output


def test_listing_needs_no_torch(directory: Path) -> None:
    """`ls` and `verify` run where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None\nfrom wbdist.cli.ckpt import command\n"
        f"command(['verify', {str(directory)!r}], standalone_mode=False)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step-4.a1            ok" in done.stdout
