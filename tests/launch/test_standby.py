"""Ranks forked from the standby: what they find is what a rank started cold finds, and the standby's end costs nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launching import Launched
from support.waiting import until

SCRIPT = Path(__file__).with_name("standby_script.py")
Start = Callable[..., Launched]


@pytest.fixture
def start(tmp_path: Path) -> Any:
    started: list[Launched] = []

    def run(*arguments: str, options: tuple[str, ...] = (), nproc: int = 2) -> Launched:
        command = ["--nproc", str(nproc), "--standby-after", "0", *options, str(SCRIPT), *arguments]
        started.append(Launched(tmp_path, command, len(started)))
        return started[-1]

    yield run
    for launched in started:
        launched.end()


def told(cwd: Path, rank: int, restart: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((cwd / f"{rank}.{restart}.json").read_text())
    return facts


@pytest.mark.slow
def test_forked_rank_is_a_fresh_process(start: Start, tmp_path: Path) -> None:
    """Proves that everything a rank can see of its process is the same forked as cold: main module, arguments, path, signals,
    descriptors, environment, parent, group, streams, what it spawns; that nothing random is shared; that a group forms."""
    job = start("group")
    assert job.wait(110) == 0, job.output
    for rank in range(2):
        cold, warm = told(tmp_path, rank, 0), told(tmp_path, rank, 1)
        assert (cold["comm"].startswith("python"), warm["comm"]) == (True, f"wbdist-rank-{rank}"), job.output
        assert warm["facts"] == cold["facts"]
        assert (cold["shown"], warm["shown"]) == (str(rank), str(rank))
        assert set(warm["open"]) <= set(cold["open"])
    own = [told(tmp_path, rank, restart)["own"] for rank in range(2) for restart in range(2)]
    assert [len(set(values)) for values in zip(*own, strict=True)] == [4, 4, 4]
    assert "[rank 0] sum 2.0" in job.output
    assert "[rank 1] sum 2.0" in job.output
    assert job.family() == []


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kills-standby", "stops-standby"])
def test_lost_standby_costs_a_cold_start_only(start: Start, tmp_path: Path, end: str) -> None:
    """Proves that the job goes on from new interpreters when the standby was killed, or does not answer."""
    job = start(end)
    assert job.wait(110) == 0, job.output
    assert all(told(tmp_path, rank, 1)["comm"].startswith("python") for rank in range(2))
    assert job.family() == []


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "text"), [("raises", 70, "ValueError: on purpose"), ("exits", 70, "a message")])
def test_forked_script_ends_as_a_script(start: Start, tmp_path: Path, end: str, code: int, text: str) -> None:
    """Proves the exit code, and that a traceback begins with the script and shows nothing of ours."""
    job = start(end, options=("--max-restarts", "0"))
    assert job.wait(110) == code, job.output
    assert told(tmp_path, 1, 1)["comm"] == "wbdist-rank-1"
    assert text in job.output
    assert "standby_main" not in job.output
    if end == "raises":
        assert f'Traceback (most recent call last):\n[rank 0]   File "{SCRIPT}"' in job.output


@pytest.mark.slow
def test_killed_launcher_leaves_neither_standby_nor_forked_ranks(start: Start, tmp_path: Path) -> None:
    """Proves that after SIGKILL to the launcher the standby and the ranks that were forked from it are soon gone."""
    job = start("hangs")
    until(lambda: (tmp_path / "0.hangs").exists() and (tmp_path / "1.hangs").exists(), "the forked ranks", timeout=110)
    assert told(tmp_path, 0, 1)["comm"] == "wbdist-rank-0"
    standby = int((tmp_path / "0.standby").read_text())
    assert standby in job.family()
    job.process.kill()
    job.process.wait(60)
    until(lambda: job.family() == [], "everything to be gone", timeout=30)  # 3 s, and what a busy machine makes of them


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_signal_with_a_standby_there(start: Start, tmp_path: Path, sent: signal.Signals) -> None:
    """Proves that ranks which were forked get the signal as others do, and that nothing is left, the standby included."""
    job = start("hangs")
    until(lambda: (tmp_path / "0.hangs").exists() and (tmp_path / "1.hangs").exists(), "the forked ranks", timeout=110)
    job.process.send_signal(sent)
    assert job.wait() in {75, 128 + sent}, job.output
    assert job.family() == []
