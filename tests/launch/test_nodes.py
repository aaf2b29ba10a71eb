"""`wbdist launch` on several hosts: launchers on loopback, each of which stands for a host."""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.launching import SCRIPT, Launched
from support.ports import free_port
from support.waiting import until

from wbdist.cli.launch import command
from wbdist.errors import EXIT_RETRYABLE
from wbdist.launch.nodes.line import Line, Lost

S = signal
WAIT = 60.0


class Hosts:
    """The launchers of one job."""

    def __init__(self, cwd: Path, nnodes: str = "2") -> None:
        self._cwd, self._nnodes = cwd, nnodes
        self.port = free_port()
        self.all: list[Launched] = []
        self.started: list[Launched] = []
        """Also those that are none of the job's any more."""

    def start(self, *script: str, options: tuple[str, ...] = (), nnodes: str | None = None, nproc: int = 1) -> Launched:
        """One more, with rank_script.py in this mode."""
        place = ("--nnodes", nnodes or self._nnodes, "--rdzv-endpoint", f"localhost:{self.port}")
        arguments = [*place, "--nproc-per-node", str(nproc), *options, str(SCRIPT), *script]
        self.started.append(Launched(self._cwd, arguments, len(self.started)))
        self.all.append(self.started[-1])
        return self.all[-1]

    def both(self, *script: str, options: tuple[str, ...] = (), nproc: int = 1) -> tuple[Launched, Launched]:
        """Node 0, which has the rendezvous, and node 1."""
        first = self.start(*script, options=options, nproc=nproc)
        until(lambda: "the rendezvous is here" in first.output, "the rendezvous", WAIT)
        return first, self.start(*script, options=options, nproc=nproc)

    def output(self) -> str:
        return "\n".join(f"--- {number}\n{one.output}" for number, one in enumerate(self.all))

    def pids(self, ranks: int = 2, restart: int = 0) -> list[int]:
        files = [self._cwd / f"{rank}.{restart}.pid" for rank in range(ranks)]
        try:
            until(lambda: all(file.exists() for file in files), "the ranks to be ready", WAIT)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        return [int(file.read_text()) for file in files]

    def codes(self) -> list[int]:
        found = [one.wait(WAIT) for one in self.all]
        assert [one.family() for one in self.all] == [[]] * len(found), "something is left alive"
        return found


def said(launched: Launched, what: str) -> None:
    """Waits for it."""
    try:
        until(lambda: what in launched.output, repr(what), WAIT)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{launched.output}") from None


def attempts(launched: Launched) -> int:
    return launched.output.count("starting rank_script.py")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    for launched in made.started:
        launched.end()


def test_a_rank_that_is_killed_restarts_the_ranks_of_all_hosts(hosts: Hosts) -> None:
    """Proves that two launchers run one job of numbered ranks, that SIGKILL of a rank on one host ends those of the other and
    starts all again once, which both say with the rank named, and that both leave with the same code and nothing behind."""
    first, second = hosts.both("waits-once", nproc=2)
    os.kill(hosts.pids(4)[3], S.SIGKILL)
    assert hosts.codes() == [0, 0], hosts.output()
    assert (attempts(first), attempts(second)) == (2, 2)
    assert "on 4 rank(s), here ranks 0 to 1, attempt 2" in first.output
    assert "on 4 rank(s), here ranks 2 to 3, attempt 2" in second.output
    assert "node 1" in first.output
    for one in hosts.all:
        assert "rank 3 was killed by SIGKILL; starting again" in one.output


@pytest.mark.slow
@pytest.mark.parametrize("sent_to", [0, 1])
@pytest.mark.parametrize(("mode", "code"), [("saves", 75), ("plain", 143)])
def test_a_signal_to_one_launcher_stops_all(hosts: Hosts, tmp_path: Path, mode: str, code: int, sent_to: int) -> None:
    """Proves that every rank gets a signal that one launcher gets, once, that all save and both launchers leave with 75; and
    that where nothing can be saved neither code promises it."""
    hosts.both(mode)
    hosts.pids()
    hosts.all[sent_to].process.send_signal(S.SIGTERM)
    assert hosts.codes() == [code, code], hosts.output()
    if mode == "saves":
        assert [(tmp_path / f"{rank}.0.got").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]


@pytest.mark.slow
def test_a_signal_before_all_hosts_are_there(hosts: Hosts) -> None:
    """Proves that a launcher that waits for others can be stopped, on the host of the rendezvous and where there is none."""
    waiting = hosts.start("plain")
    said(waiting, "waiting for node 1")
    waiting.process.send_signal(S.SIGTERM)
    assert waiting.wait(WAIT) == 143, waiting.output
    alone = hosts.start("plain", options=("--node-rank", "1"))
    said(alone, "waiting for the rendezvous")
    alone.process.send_signal(S.SIGINT)
    assert alone.wait(WAIT) == 130, alone.output


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_launcher_that_is_killed_and_comes_back(hosts: Hosts, lost: int) -> None:
    """Proves that after SIGKILL of a launcher, also of the one that has the rendezvous, no rank of it is left, the other says
    who was lost, ends its ranks and waits, and that the job goes on with its next attempt when the host is back."""
    both = hosts.both("waits-once")
    hosts.pids()
    killed, other = both[lost], both[1 - lost]
    killed.process.kill()
    killed.process.wait(10)
    said(other, "node 1 (" if lost else f"the node that hosts the rendezvous (localhost:{hosts.port}) was lost")
    until(lambda: killed.family() == [], "the ranks of the killed launcher to be gone", 5)
    hosts.all.remove(killed)
    hosts.start("waits-once")
    assert hosts.codes() == [0, 0], hosts.output()
    assert "on 2 rank(s), here rank" in other.output
    assert all("attempt 2" in one.output for one in hosts.all), hosts.output()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_launcher_that_is_killed_for_good(hosts: Hosts, lost: int) -> None:
    """Proves that a host which does not come back is waited for --join-timeout seconds, and named; then the code is 70."""
    # Both have to start within that time, too, on a busy machine.
    both = hosts.both("plain", options=("--join-timeout", "10"))
    hosts.pids()
    both[lost].process.kill()
    other = both[1 - lost]
    assert other.wait(WAIT) == 70, other.output
    assert ("waited 10 s for node 1; here: node 0" if lost else "waited 10 s for the rendezvous at localhost") in other.output
    assert other.family() == []


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_host_that_falls_silent(hosts: Hosts, silent: int) -> None:
    """Proves that a host of which nothing is heard, though its connection stands, is lost after --keep-alive seconds and is
    part of the next attempt when it is heard again, its old ranks being gone."""
    both = hosts.both("waits-once", options=("--keep-alive", "2"))
    old = hosts.pids()
    both[silent].process.send_signal(S.SIGSTOP)
    said(both[1 - silent], "nothing was heard of it for")
    both[silent].process.send_signal(S.SIGCONT)
    assert hosts.codes() == [0, 0], hosts.output()
    assert [attempts(one) for one in both] == [2, 2], hosts.output()
    assert not any(Path(f"/proc/{pid}").exists() for pid in old)


@pytest.mark.slow
def test_the_budget_is_the_jobs(hosts: Hosts) -> None:
    """Proves that restarts count once for all hosts, and that progress, which one host's rank 0 tells, renews them."""
    until_third = hosts.both("until", "3", options=("--max-restarts", "1"))
    assert hosts.codes() == [0, 0], hosts.output()
    assert [attempts(one) for one in until_third] == [4, 4]
    hosts.all.clear()
    both = hosts.both("until", "5", "idle", options=("--max-restarts", "1"))
    assert hosts.codes() == [70, 70], hosts.output()
    assert [attempts(one) for one in both] == [2, 2]
    assert "giving up (--max-restarts 1" in both[1].output


@pytest.mark.slow
def test_hosts_come_and_go(tmp_path: Path, hosts: Hosts) -> None:
    """Proves that with --nnodes 2:3 a lost host leaves two that go on, that a third joins them while they run, whose ranks save
    for it, and that neither costs a restart of the budget when progress was made."""
    options = {"nnodes": "2:3", "options": ("--max-restarts", "1")}
    first = hosts.start("saves", **options)  # type: ignore[arg-type]
    said(first, "the rendezvous is here")
    second = hosts.start("saves", **options)  # type: ignore[arg-type]
    said(first, "node 1 (")
    third = hosts.start("saves", **options)  # type: ignore[arg-type]
    hosts.pids(3)
    third.process.kill()
    hosts.all.remove(third)
    hosts.pids(2, restart=1)
    said(first, "on 2 rank(s), here rank 0, attempt 2")
    fourth = hosts.start("saves", **options)  # type: ignore[arg-type]
    hosts.pids(3, restart=2)
    for one, rank in ((first, 0), (second, 1), (fourth, 2)):
        said(one, f"on 3 rank(s), here rank {rank}, attempt 3")
    assert [(tmp_path / f"{rank}.1.got").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]
    fourth.process.send_signal(S.SIGTERM)
    assert hosts.codes() == [75, 75, 75], hosts.output()


@pytest.mark.slow
def test_who_does_not_belong_is_refused(hosts: Hosts) -> None:
    """Proves that other counts, another key, one host too many and a number that is taken end with 65 and a sentence, while
    the job that they knocked at goes on."""
    both = hosts.both("plain", options=("--keep-alive", "1"))
    hosts.pids()
    wrong: list[tuple[Callable[[], Launched], str]] = [
        (lambda: hosts.start("plain", nnodes="3"), "it was started with --nnodes 3, the node that hosts the rendezvous with 2"),
        (lambda: hosts.start("plain", options=("--rdzv-id", "other")), "it has another key"),
        (lambda: hosts.start("plain"), "there is no place for another node: node 0"),
        (lambda: hosts.start("plain", options=("--node-rank", "1")), "no place for another node with --node-rank 1"),
        (lambda: hosts.start("plain", options=("--node-rank", "0")), f"port {hosts.port} cannot be used here"),
    ]
    for start, why in wrong:
        stranger = start()
        hosts.all.remove(stranger)
        assert stranger.wait(WAIT) == 65, stranger.output
        assert why in stranger.output
    assert [one.process.poll() for one in both] == [None, None], hosts.output()
    both[0].process.send_signal(S.SIGTERM)
    assert hosts.codes() == [143, 143]


@pytest.mark.slow
def test_another_services_port(hosts: Hosts) -> None:
    """Proves that what answers there and is no rendezvous is said to be none: at once when it speaks, else in time."""
    with socket.create_server(("localhost", 0)) as service:
        hosts.port = service.getsockname()[1]
        launched = hosts.start("plain")
        talking, _ = service.accept()
        talking.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        assert launched.wait(WAIT) == 65, launched.output
        assert "is no rendezvous of wbdist launch" in launched.output
        talking.close()
        silent = hosts.start("plain", options=("--join-timeout", "1"))
        assert silent.wait(WAIT) == 70, silent.output
        assert "somebody listens there, and says nothing" in silent.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--nnodes", "2"), "needs --rdzv-endpoint"),
        (("--nnodes", "2", "--rdzv-endpoint", "node0"), "give host:port"),
        (("--nnodes", "2", "--rdzv-endpoint", "node0:0"), "port 0"),
        (("--nnodes", "2", "--rdzv-endpoint", "node0:99999"), "port 99999"),
        (("--nnodes", "2", "--rdzv-endpoint", "node0:1", "--node-rank", "2"), "node rank 2 of 2"),
        (("--nnodes", "2", "--rdzv-endpoint", "node..0:1", "--node-rank", "1"), "can be no host"),
        (("--nnodes", "3:2", "--rdzv-endpoint", "node0:1"), "no more at least than at most"),
        (("--nnodes", "0", "--rdzv-endpoint", "node0:1"), "give at least 1"),
        (("--nnodes", "two"), "MIN:MAX"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: tuple[str, ...], why: str) -> None:
    """Proves that the command line says what to give."""
    done = CliRunner().invoke(command, [*arguments, str(SCRIPT)])
    assert done.exit_code == 2
    assert why in done.output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_connection_that_fails_as_nobody_expects_is_lost() -> None:
    """Proves that the launcher, which waits for what its connection's thread says, hears of that thread's own end."""
    line = Line("node..0", 1, key=b"", hello=lambda *_: None, timeout=WAIT, say=print)  # type: ignore[arg-type,return-value]
    line.start()
    with selectors.DefaultSelector() as selector:
        selector.register(line.wake, selectors.EVENT_READ)
        assert selector.select(WAIT), "nothing came"
    (lost,) = line.events()
    line.close()
    assert isinstance(lost, Lost)
    assert lost.exit_code == EXIT_RETRYABLE
    assert "node..0:1" in lost.why
