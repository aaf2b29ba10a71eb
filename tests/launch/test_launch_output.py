"""Output of many ranks on one terminal, and the command line itself."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.launching import SCRIPT, Launch

from wbdist.cli.launch import command
from wbdist.launch import intent


def test_lines_of_four_ranks_are_whole(launch: Launch, tmp_path: Path) -> None:
    """Proves that no line is cut, mixed or lost though each is written in pieces, that each carries its rank, and that the log
    files have every byte as it was written."""
    job = launch("prints", "300", nproc=4, options=("--log-dir", "logs"))
    assert job.wait() == 0, job.output[-2000:]
    lines = [line for line in job.output.splitlines() if not line.startswith("wbdist launch:")]
    pattern = re.compile(r"\[rank (\d)\] (?:rank \1 line (\d+) x* end|last words without a newline)")
    assert [line for line in lines if not pattern.fullmatch(line)] == []
    assert Counter(line[:8] for line in lines) == {f"[rank {rank}]": 301 for rank in range(4)}
    for rank in range(4):
        own = [line for line in lines if line.startswith(f"[rank {rank}] rank")]
        assert [int(line.split()[5]) for line in own] == list(range(300))
        text = (tmp_path / "logs" / f"rank-{rank}.0.out").read_text()
        assert text.splitlines() == [line[9:] for line in own]
        assert (tmp_path / "logs" / f"rank-{rank}.0.err").read_text() == "last words without a newline"


def test_progress_bars_become_few_lines(launch: Launch) -> None:
    """Proves that a bar drawn with carriage returns gives a line now and then and its last state, not a line a redraw."""
    job = launch("bar")
    assert job.wait() == 0
    bars = [line for line in job.output.splitlines() if "%|" in line]
    assert sum("100%|##########" in line for line in bars) == 2
    assert len(bars) <= 6
    assert all(re.fullmatch(r"\[rank \d\] +\d+%\|#*", line) for line in bars)


def test_one_rank_has_the_terminal_for_itself(launch: Launch) -> None:
    """Proves that a single rank's output is its own, byte for byte."""
    job = launch("facts", "--lr", "0.1", nproc=1)
    assert job.wait() == 0
    assert f"argv ['facts', '--lr', '0.1'] main __main__ file rank_script.py path {SCRIPT.parent}\n" in job.output


def test_reader_that_goes_away_does_not_end_the_job() -> None:
    """Proves that `wbdist launch ... | head` lets the job finish: only what it prints is lost."""
    with subprocess.Popen(
        [sys.executable, "-m", "wbdist", "launch", "--nproc", "2", str(SCRIPT), "prints", "3000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(90) == 0


def test_module_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that -m runs a module as python -m does."""
    (tmp_path / "mine.py").write_text("import sys; print('spec', __spec__.name, sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, "-m", "wbdist", "launch", "-m", "mine", "--flag"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "spec mine ['--flag']\n"), done.stderr


def test_dry_run_starts_nothing_and_can_be_pasted(tmp_path: Path) -> None:
    """Proves that --dry-run prints one line a rank with its environment and command, and writes nothing."""
    done = CliRunner().invoke(command, ["--nproc", "2", "--dry-run", str(SCRIPT), "plain", "a b"])
    assert done.exit_code == 0, done.output
    first, second, note = done.output.splitlines()
    assert "RANK=0" in first
    assert "WORLD_SIZE=2" in first
    assert first.replace("RANK=0", "RANK=1") == second
    assert first.endswith("plain 'a b'")
    assert "MASTER_PORT" in note
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nnodes", "2:4", str(SCRIPT)], "needs --rdzv-endpoint"),
        (["no-such-script.py"], "no script 'no-such-script.py'"),
        (["--nproc", "0", str(SCRIPT)], "--nproc"),
        ([], "SCRIPT"),
    ],
)
def test_bad_calls_are_refused_with_the_fix(arguments: list[str], said: str) -> None:
    """Proves that what cannot work is refused before anything starts, and says what to do."""
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_help_has_an_example() -> None:
    """Proves that the help shows how it is called and what the exit codes mean."""
    text = CliRunner().invoke(command, ["--help"]).output
    assert "wbdist launch --nproc 2 train.py" in text
    assert "75 preempted" in text


def test_intents_survive_bad_files(tmp_path: Path) -> None:
    """Proves that verdicts and progress are read back, and that torn or foreign files count as absent."""
    intent.write(1, intent.Verdict("fenced", 69, "another"), str(tmp_path))
    intent.write_progress(40, str(tmp_path))
    intent.write_progress(50, str(tmp_path))
    (tmp_path / "rank-0.json").write_text('{"verdict": "fin')
    (tmp_path / "rank-x.json").write_text("{}")
    assert intent.read_all(tmp_path) == {1: intent.Verdict("fenced", 69, "another")}
    assert intent.read_progress(tmp_path) == 50
    (tmp_path / "progress.json").write_text("")
    assert intent.read_progress(tmp_path) == -1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json", "rank-0.json", "rank-1.json", "rank-x.json"]
