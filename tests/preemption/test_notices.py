"""Notice sources and the hub: real signals, real files, real forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.waiting import until

from wbdist.errors import UsageError
from wbdist.preemption.file import FileSource
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice
from wbdist.preemption.signals import SignalSource


@pytest.fixture
def watching() -> Iterator[Callable[..., NoticeHub]]:
    """Makes started hubs and closes them; the process's own handlers must be back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    hubs: list[NoticeHub] = []

    def make(*sources: object) -> NoticeHub:
        hub = NoticeHub(sources)  # type: ignore[arg-type]
        hub.start()
        hubs.append(hub)
        return hub

    yield make
    for hub in reversed(hubs):
        hub.close()
        hub.close()
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signal_becomes_one_notice(watching: Callable[..., NoticeHub], number: signal.Signals) -> None:
    """Proves that a signal gives exactly one notice with its name and the grace as deadline, off the main thread; and that a
    doubled one changes nothing."""
    heard: list[tuple[Notice, str]] = []
    hub = watching(SignalSource(grace=30.0))
    hub.on_notice(lambda notice: heard.append((notice, threading.current_thread().name)))
    os.kill(os.getpid(), number)
    until(lambda: heard, "the notice")
    if number != signal.SIGINT:
        for _ in range(5):
            os.kill(os.getpid(), number)
    notice, thread = heard[0]
    assert (notice.source, notice.reason) == ("signal", number.name)
    assert notice.deadline is not None
    assert 25 < notice.deadline - time.time() <= 30
    assert thread == "wbdist-signals"
    hub.close()
    assert len(heard) == 1


def test_second_ctrl_c_is_keyboard_interrupt(watching: Callable[..., NoticeHub]) -> None:
    """Proves that the first Ctrl-C is a notice and the second ends the main thread's work at once."""
    hub = watching(SignalSource())
    os.kill(os.getpid(), signal.SIGINT)
    until(lambda: hub.notice, "the notice")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


STUCK = """
import hashlib, threading
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.signals import SignalSource
hub = NoticeHub([SignalSource()])
hub.start()
stuck = True
hub.on_notice(lambda notice: print("notice while", "stuck" if stuck else "free", flush=True))
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 6_000_000)  # seconds in C, without the GIL and without looking at signals
stuck = False
"""


def test_notice_arrives_while_the_main_thread_is_stuck_in_c() -> None:
    """Proves what the wakeup descriptor is for: the notice comes while the main thread sits in one long C call, as it does in
    a collective, where no Python handler runs."""
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "notice while stuck\n"
    finally:
        process.kill()
        process.wait()


def in_child(body: Callable[[], None]) -> int:
    """Exit code, negative for a signal, of a forked child that runs `body` and then waits to be killed."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:  # whatever happens, the child must not go on as a second test process
            os.write(done, b"x")
            body()
            signal.pause()
        finally:
            os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
    return pid


def test_forked_children_keep_out_of_it(watching: Callable[..., NoticeHub]) -> None:
    """Proves that signals to a forked child (a DataLoader worker) are not read as the parent's, that Ctrl-C and SIGUSR2 do not
    take the worker away, and that SIGTERM still ends it, as multiprocessing needs."""
    hub = watching(SignalSource())
    pid = in_child(lambda: None)
    try:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.05)  # nothing to poll for: the proof is that nothing happens
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        assert hub.notice is None
    finally:
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert hub.notice is None
    os.kill(os.getpid(), signal.SIGUSR2)
    until(lambda: hub.notice, "the parent's own notice")


def test_handler_of_somebody_else_is_still_called(watching: Callable[..., NoticeHub]) -> None:
    """Proves that an earlier handler runs as well, and is in place again after `close`."""
    called: list[int] = []

    def mine(number: int, _frame: object) -> None:
        called.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        hub = watching(SignalSource())
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: hub.notice and called, "both")
        hub.close()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_wakeup_descriptor_of_somebody_else_still_hears(watching: Callable[..., NoticeHub]) -> None:
    """Proves that an event loop that had the process's wakeup descriptor before gets its bytes, and gets it back."""
    read, write = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(write)
    hub = watching(SignalSource())
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: hub.notice, "the notice")
    hub.close()
    assert signal.SIGTERM in os.read(read, 64)
    assert signal.set_wakeup_fd(-1) == write
    os.close(read)
    os.close(write)


def test_signal_that_came_too_late_is_not_swallowed() -> None:
    """Proves that a signal which the closed hub did not take is raised again for whoever listens after `close`."""
    late: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: late.append(number))
    try:
        source = SignalSource([signal.SIGUSR2])
        source.start(lambda _notice: False)  # as a hub that is closed
        os.kill(os.getpid(), signal.SIGUSR2)
        until(lambda: source._untaken, "the byte to be read")
        late.clear()
        source.close()
        assert late == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_misuse_is_refused() -> None:
    """Proves that SIGUSR1, SIGKILL, another thread and a second start are refused with the reason."""
    with pytest.raises(UsageError, match="NCCL"):
        SignalSource([signal.SIGUSR1])
    with pytest.raises(UsageError, match="cannot be caught"):
        SignalSource([signal.SIGKILL])
    with pytest.raises(UsageError, match="interval"):
        FileSource("stop", interval=0)
    problems: list[BaseException] = []

    def elsewhere() -> None:
        try:
            NoticeHub([SignalSource()]).start()
        except UsageError as error:
            problems.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(problems[0])
    source = SignalSource()
    source.start(lambda _notice: True)
    with pytest.raises(UsageError, match="started before"):
        source.start(lambda _notice: True)
    source.close()


def test_failed_start_gives_back_what_was_taken() -> None:
    """Proves that when a later source cannot start, the signal handlers of an earlier one are not left behind."""
    before = signal.getsignal(signal.SIGTERM)
    used = FileSource("never")
    used.start(lambda _notice: True)
    with pytest.raises(UsageError):
        NoticeHub([SignalSource(), used]).start()
    used.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_file_is_a_notice_and_its_line_the_reason(tmp_path: Path, watching: Callable[..., NoticeHub]) -> None:
    """Proves that a file that appears gives one notice with its first line, and that one that was there before counts."""
    path = tmp_path / "stop"
    hub = watching(FileSource(path, interval=0.01))
    assert hub.notice is None
    temporary = tmp_path / "stop.tmp"
    temporary.write_text("maintenance at noon\nmore\n")
    temporary.rename(path)
    until(lambda: hub.notice, "the notice")
    assert hub.notice is not None
    assert (hub.notice.source, hub.notice.reason) == ("file", "maintenance at noon")
    path.write_text("")
    late = watching(FileSource(path, interval=60.0))
    until(lambda: late.notice, "the notice of a file that is there already")
    assert late.notice is not None
    assert str(path) in late.notice.reason
    began = time.monotonic()
    late.close()
    assert time.monotonic() - began < 20


def test_first_notice_wins_and_later_ones_only_shorten() -> None:
    """Proves the hub's merging: source and reason of the first, the earliest deadline of all, one call per listener."""
    hub = NoticeHub([])
    heard: list[Notice] = []
    hub.on_notice(heard.append)
    assert hub.tell(Notice("a", "first", 0.0, None))
    assert hub.tell(Notice("b", "second", 1.0, 500.0))
    assert hub.tell(Notice("c", "third", 2.0, 900.0))
    assert hub.notice == Notice("a", "first", 0.0, 500.0)
    hub.on_notice(heard.append)
    assert [notice.source for notice in heard] == ["a", "a"]
    hub.close()
    assert not hub.tell(Notice("d", "fourth", 3.0, 1.0))
