"""What the supervisor does with the ends of ranks: restart, relaunch, give up, and with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.launching import Launch, Launched
from support.waiting import until

from wbdist.errors import UsageError
from wbdist.launch import attempt, intent
from wbdist.launch.judgement import RankEnd, judge
from wbdist.launch.policy import Decision, Policy
from wbdist.launch.supervisor import LaunchSpec, supervise

S = signal
NO_RESTARTS = ("--max-restarts", "0")


def attempts(job: Launched) -> int:
    return job.output.count("starting rank_script.py")


@pytest.mark.parametrize(
    ("codes", "expected", "why"),
    [
        ("0,0", 0, "finished"),
        ("75,75", 75, "preempted"),
        ("0,75", 75, "preempted"),
        ("0,65", 65, "rank 1 ended with exit code 65"),
        ("69,0", 69, "rank 0 ended with exit code 69"),
        ("0,2", 65, "rank 1 ended with exit code 2"),
        ("70,0", 70, "rank 0 ended with exit code 70"),
        ("0,1", 70, "rank 1 ended with exit code 1"),
    ],
)
def test_exit_codes_of_real_ranks(launch: Launch, codes: str, expected: int, why: str) -> None:
    """Proves the exit-code contract from processes to the launcher's own code, and that the message names the rank."""
    job = launch("codes", codes, options=NO_RESTARTS)
    assert job.wait() == expected, job.output
    assert why in job.output
    assert attempts(job) == 1
    assert job.family() == []


def end(rank: int, code: int, at: float = 0.0, verdict: intent.Word | None = None, *, by_us: bool = False) -> RankEnd:
    codes = {"finished": 0, "preempted": 75, "failed": 70, "failed_for_good": 65, "fenced": 69}
    said = None if verdict is None else intent.Verdict(verdict, codes[verdict], "its words")
    return RankEnd(rank=rank, code=code, at=at, by_us=by_us, said=said)


@pytest.mark.parametrize(
    ("ends", "stopped_by", "committed", "code", "why"),
    [
        # The verdict file knows better than a flattened, hidden or missing code.
        ([end(0, 1, verdict="failed_for_good"), end(1, 0)], None, False, 65, "rank 0 ended with exit code 1: its words"),
        ([end(0, 0, verdict="preempted"), end(1, 0, verdict="preempted")], None, False, 75, "a notice"),
        ([end(0, -9, verdict="preempted"), end(1, 75)], S.SIGTERM, False, 75, "SIGTERM"),
        # ... but not when the process went on after it and failed.
        ([end(0, 1, verdict="finished"), end(1, 0)], None, False, 70, "rank 0 ended with exit code 1"),
        # The gravest of those that ended by themselves decides; those we ended say nothing.
        ([end(0, 70), end(1, 65)], None, False, 65, "rank 1"),
        ([end(0, 1), end(1, 65, by_us=True)], None, False, 70, "rank 0"),
        ([end(0, 1, at=1.0), end(1, -15, at=4.0, by_us=True)], None, False, 70, "rank 0"),
        # The cause is the first; of two at once, the one that was killed.
        ([end(0, 1, at=5.0), end(1, 1, at=1.0)], None, False, 70, "rank 1"),
        ([end(0, 1, at=1.0), end(1, -9, at=1.05)], None, False, 70, "rank 1 was killed by SIGKILL"),
        ([end(0, 1, at=1.0), end(1, -9, at=2.0)], None, False, 70, "rank 0"),
        # Told to stop: what the code promises depends on what is on disk.
        ([end(0, -15), end(1, -15)], S.SIGTERM, False, 143, "before anything was saved"),
        ([end(0, 70), end(1, 70)], S.SIGTERM, True, 75, "the last committed checkpoint stands"),
        ([end(0, -9, by_us=True), end(1, 75)], S.SIGTERM, False, 75, "state saved"),
        ([end(0, 0), end(1, 0)], S.SIGTERM, False, 0, "finished"),
        ([end(0, -35), end(1, 0)], None, False, 70, "signal 35"),
    ],
)
def test_judgement(ends: list[RankEnd], stopped_by: int | None, committed: bool, code: int, why: str) -> None:
    """Proves each rule of the judgement, on values."""
    judged = judge(ends, stopped_by, committed=committed)
    assert (judged.exit_code, why in judged.why) == (code, True), judged


def test_killed_rank_restarts_the_job(launch: Launch) -> None:
    """Proves that SIGKILL to a rank ends the others, which do not notice by themselves, and starts all again; the end is 0."""
    job = launch("waits-once")
    os.kill(job.pids()[1], S.SIGKILL)
    assert job.wait() == 0, job.output
    assert attempts(job) == 2
    assert "rank 1 was killed by SIGKILL" in job.output
    assert job.family() == []


def test_start_up_death_is_named_and_the_others_are_gone_within_10_s(launch: Launch) -> None:
    """Proves the bound with a peer that ignores SIGTERM, and that the message names the rank and shows what it said last."""
    job = launch("dies-at-start", "1", options=NO_RESTARTS)
    began = time.monotonic()
    until(lambda: "rank 1 ended with exit code 1" in job.output, "the rank to be named")
    assert job.wait() == 70, job.output
    assert time.monotonic() - began < 30
    assert "wbdist launch:   rank 1: no such file: weights.bin" in job.output
    assert job.family() == []


def test_progress_does_not_spend_the_budget(launch: Launch) -> None:
    """Proves that a job which commits something new between crashes may crash more often than --max-restarts, with no pause."""
    job = launch("until", "5", options=("--max-restarts", "1"))
    began = time.monotonic()
    assert job.wait() == 0, job.output
    assert attempts(job) == 6
    assert time.monotonic() - began < 60


def test_no_progress_does(launch: Launch) -> None:
    """Proves that a job which commits nothing is given up after --max-restarts restarts, with a code that says so."""
    job = launch("until", "5", "idle", options=("--max-restarts", "1"))
    assert job.wait() == 70, job.output
    assert attempts(job) == 2
    assert "2 attempt(s) in a row without a new checkpoint, giving up" in job.output
    assert "starting again in" in job.output


def test_relaunch_in_place(launch: Launch) -> None:
    """Proves that with --on-preempt relaunch a preempted job is started again here, and told why; and by default is not."""
    job = launch("preempted-once", options=("--on-preempt", "relaunch"))
    assert job.wait() == 0, job.output
    assert "cause: preempted by a notice, state saved" in job.output
    assert launch("preempted-once").wait() == 75


def test_ctrl_c_is_never_relaunched(launch: Launch) -> None:
    """Proves that a person can end a job that is relaunched after preemptions; and that SIGTERM does relaunch it."""
    job = launch("saves", options=("--on-preempt", "relaunch"))
    job.pids()
    job.process.send_signal(S.SIGTERM)
    job.pids(restart=1)
    job.process.send_signal(S.SIGINT)
    assert job.wait() == 75, job.output
    assert attempts(job) == 2


def test_helpers_of_a_rank_that_ended_are_ended(launch: Launch, tmp_path: Path) -> None:
    """Proves that a helper which outlives its rank is gone when the launcher returns, also after exit code 0."""
    job = launch("leaves-helper")
    assert job.wait() == 0, job.output
    assert len(list(tmp_path.glob("*.helper"))) == 2
    assert job.family() == []


def test_every_attempt_has_a_name_a_port_and_a_directory_of_its_own() -> None:
    """Proves what tells one incarnation from the next, and that ranks differ in nothing but their rank."""
    seen: list[list[Mapping[str, str]]] = []

    def start(environments: Sequence[Mapping[str, str]]) -> list[Quick]:
        seen.append(list(environments))
        intent.write_progress(len(seen), environments[0][intent.VARIABLE])
        return [Quick(1 if len(seen) < 3 else 0) for _ in environments]

    assert supervise(LaunchSpec(nprocs=2), start, say=lambda _line: None) == 0
    for name in ("WBDIST_INCARNATION", "WBDIST_INTENT_DIR", "WBDIST_RESTART"):
        assert len({ranks[0][name] for ranks in seen}) == 3
        assert all(ranks[0][name] == ranks[1][name] for ranks in seen)
    assert [rank["RANK"] for rank in seen[0]] == ["0", "1"]
    differ = {name for name in seen[0][0] if seen[0][0][name] != seen[0][1][name]}
    assert differ == {"RANK", "LOCAL_RANK"}
    assert not Path(seen[0][0][intent.VARIABLE]).exists()


class Quick:
    """A rank that has ended when it is looked at."""

    def __init__(self, code: int) -> None:
        self.pid, self.returncode = 2**22 + 1, code

    def poll(self) -> int:
        return self.returncode

    def send_signal(self, sig: int, /) -> None:
        raise AssertionError("it has ended")


def test_supervisor_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that handlers are restored, also when the ranks cannot be started, and that misuse is refused."""
    before = [signal.getsignal(number) for number in (S.SIGTERM, S.SIGINT, S.SIGUSR1)]

    def cannot(_environments: Sequence[Mapping[str, str]]) -> list[Quick]:
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        supervise(LaunchSpec(nprocs=2), cannot, say=lambda _line: None)
    assert [signal.getsignal(number) for number in (S.SIGTERM, S.SIGINT, S.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises(UsageError, match="nprocs=0"):
        LaunchSpec(nprocs=0)
    problems: list[BaseException] = []

    def elsewhere() -> None:
        try:
            supervise(LaunchSpec(nprocs=1), cannot)
        except UsageError as error:
            problems.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(problems[0])


def test_kernel_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that where pidfd_open is refused (some sandboxes) ends are found by looking."""

    def refused(_pid: int, _flags: int = 0) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)

    def start(environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[bytes]]:
        return [subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(0.2)"]) for _ in environments]

    began = time.monotonic()
    assert supervise(LaunchSpec(nprocs=2), start, say=lambda _line: None) == 0
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("watches", "durable", "code"), [(False, False, -S.SIGTERM), (True, False, 70), (True, True, -S.SIGKILL)]
)
def test_a_killed_rank_takes_along_who_has_nothing_to_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, watches: bool, durable: bool, code: int
) -> None:
    """Proves that after SIGKILL to a rank the others are ended at once where nothing is lost by it: without a handler for
    SIGTERM, and a job's ranks. Others are left their time, and end by themselves. The killed rank is the cause in any case."""
    monkeypatch.setattr(attempt, "PEERS_FAIL", 1000.0)
    handler = "signal.signal(signal.SIGTERM, lambda *_: print(1 / 0))" if watches else ""
    script = tmp_path / "rank.py"
    script.write_text(
        f"import os, signal, sys, time\nfrom pathlib import Path\n{handler}\n"
        f"if {durable}: Path(os.environ['WBDIST_INTENT_DIR'], 'rank-0.durable').touch()\n"
        "Path(sys.argv[1] + '.ready').touch()\n"
        "if sys.argv[1] == '1':\n    while not Path('0.ready').exists(): time.sleep(0.01)\n    os.kill(os.getpid(), 9)\n"
        f"while not ({watches and not durable} and Path('noticed').exists()): time.sleep(0.01)\nsys.exit(70)\n"
    )
    said: list[str] = []
    started: list[subprocess.Popen[bytes]] = []

    def start(environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, "-S", str(script)]
        started[:] = [
            subprocess.Popen([*command, one["RANK"]], cwd=tmp_path, process_group=0, env={**os.environ, **one})
            for one in environments
        ]
        return list(started)

    def say(line: str) -> None:
        said.append(line)
        if "stopping rank 0" in line:
            (tmp_path / "noticed").touch()

    if durable:  # only where it is started again
        monkeypatch.setattr(Policy, "decide", lambda *_: Decision(70, said[-1]))
    assert supervise(LaunchSpec(nprocs=2, max_restarts=int(durable)), start, say=say) == 70
    assert [rank.returncode for rank in started] == [code, -S.SIGKILL]
    assert "rank 1 was killed by SIGKILL" in said[-1]
