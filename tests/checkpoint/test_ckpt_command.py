"""`wbdist ckpt`: what it prints and the code it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.ranks import alone
from support.training import Training

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
    assert run("ls", directory)[1].startswith("step-4.a1")
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
    assert run("ls", directory)[0] == 1


def test_rm(directory: Path) -> None:
    """Removes what it is told, names what there is otherwise, and keeps the last one unless forced."""
    assert run("rm", directory, "step-2.a1", "--json") == (0, '["step-2.a1"]\n')
    code, output = run("rm", directory, "step-9.a1")
    assert code == 2
    assert "['step-4.a1', 'step-3.a1']" in output
    assert run("rm", directory, "step-3.a1", "step-4.a1")[0] == 2
    assert run("rm", directory, "step-3.a1", "step-4.a1", "--force")[0] == 0
    assert list(directory.iterdir()) == []


def test_diff(directory: Path) -> None:
    """Tells every value that differs; a checkpoint does not differ from itself."""
    code, output = run("diff", directory, "--json")
    parts = {row["part"]: row for row in json.loads(output)}
    assert code == 1
    assert parts["shared/data.consumed"] == {"part": "shared/data.consumed", "step-3.a1": "12", "step-4.a1": "16"}
    assert {"shared/model.0.weight", "shared/optimizer.state.0.exp_avg", "rank-0/rng.torch", "rank-0/rng.python"} <= set(parts)
    assert "shared/data.seed" not in parts
    assert run("diff", directory, "step-3.a1", "step-3.a1") == (0, "step-3.a1 and step-3.a1 hold the same\n")


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
