"""The shipper as a process: kills, signals, one instance, leaving; with the training side's client."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.waiting import until

from wbdist.run.shipper import client
from wbdist.run.shipper.control import Request, call, socket_path


def steps(server: Any, attempt: int = 1, writer: str = "rank0") -> list[int]:
    return [row["_step"] for row in server.history(attempt, writer)]


def test_a_run_from_watch_to_goodbye(loopback: Any, wandb: Any) -> None:
    """Proves the usual life: started by the first run without waiting, acknowledges flushes, delivers the end, marks the
    journal, cleans up after itself and leaves; its socket is the user's alone."""
    writer = wandb.journal(loopback.url)
    began = time.monotonic()
    client.watch(wandb.root, writer.path, loopback.url, "k" * 40)
    assert time.monotonic() - began < 10
    wandb.rows(writer, 0, 200)
    assert client.flush(wandb.root, writer.path, 20.0)
    assert steps(loopback) == list(range(200))
    path = socket_path(wandb.root)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.getsid(wandb.pid()) != os.getsid(0), "the shipper must not get the job's signals"
    wandb.rows(writer, 200, 300)
    until(lambda: steps(loopback) == list(range(300)), "rows to arrive by themselves")
    writer.close(0)
    assert client.flush(wandb.root, writer.path, 20.0)
    assert loopback.marks == ["begin 1", "complete 0", "ended exit"]
    until(lambda: not path.exists() and not path.with_suffix(".lock").exists(), "the shipper to leave")
    assert writer.path.with_name(writer.path.name + ".shipped").exists()
    assert "ERROR" not in wandb.log(), wandb.log()


@pytest.mark.parametrize("seed", range(2))
def test_kill_nine_at_random(loopback: Any, wandb: Any, seed: int) -> None:
    """Proves that a shipper killed with SIGKILL again and again while it ships, and restarted by whoever flushes, brings every
    row exactly once and in order, also to a server that is stopped and started meanwhile."""
    chance = random.Random(seed)
    writer = wandb.journal(loopback.url)
    client.watch(wandb.root, writer.path, loopback.url, "k" * 40)
    written = 0
    for turn in range(5):
        for _ in range(10):
            wandb.rows(writer, written, written + 250)
            written += 250
            time.sleep(chance.uniform(0.0, 0.01))
        if turn == 2:
            loopback.stop()
        if pid := wandb.pid():
            time.sleep(chance.uniform(0.0, 0.1))
            os.kill(pid, signal.SIGKILL)
        if turn == 2:
            loopback.start()
        assert client.flush(wandb.root, writer.path, 20.0), wandb.log()
        assert steps(loopback) == list(range(written)), "acknowledged, but not there"
    writer.close(0)
    assert client.flush(wandb.root, writer.path, 20.0)
    assert steps(loopback) == list(range(written))
    assert loopback.marks == ["begin 1", "complete 0", "ended exit"]


TRAINER = """
import os, sys, time
from pathlib import Path
from wbdist.run.journal import JournalHeader, JournalWriter
names = {"run_id": "r1", "project": "p", "entity": "", "attempt": 1, "nonce": "n1", "writer": "rank0"}
header = JournalHeader(**names, created=time.time(), online=True, base_url=sys.argv[2])
writer = JournalWriter.create(Path(sys.argv[1]), header)
from wbdist.run.shipper import client
client.watch(Path(sys.argv[1]).parents[1], writer.path, sys.argv[2], "k" * 40)
step = 0
while True:
    writer.append_row({"i": step}, step=step, commit=True, time=time.time())
    step += 1
    if step % 100 == 0:
        print(step, flush=True)
        time.sleep(0.02)
"""


@pytest.mark.parametrize("whom", ["trainer", "group"])
def test_a_killed_trainer_is_reported(loopback: Any, wandb: Any, whom: str) -> None:
    """Proves that the shipper outlives a SIGKILLed trainer, and SIGTERM and SIGINT to the trainer's whole group, delivers every
    row whose append had returned and reports the end as `lost`."""
    directory = wandb.root / "run-r1-1"
    directory.mkdir()
    command = [sys.executable, "-c", TRAINER, str(directory / "rank0.a1.wbdj"), loopback.url]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert trainer.stdout is not None
    until(lambda: len(steps(loopback)) > 100, "rows on the server")
    if whom == "group":
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(trainer.pid, number)
    else:
        trainer.kill()
    logged = max(int(line) for line in trainer.stdout.read().split())
    trainer.wait(10)
    trainer.stdout.close()
    until(lambda: "ended lost" in loopback.marks, "the report")
    seen = steps(loopback)
    assert seen == list(range(len(seen)))
    assert len(seen) >= logged


def test_one_instance_a_root(loopback: Any, wandb: Any) -> None:
    """Proves that of several shippers started for a root one stays, and the others hand over what they were told and leave."""
    writer = wandb.journal()
    processes = [wandb.shipper("--linger", "30") for _ in range(4)]
    until(lambda: sum(process.poll() is None for process in processes) == 1 and wandb.pid(), "one shipper")
    assert [process.returncode for process in processes].count(0) == 3
    request = Request("watch", str(writer.path), loopback.url, "k" * 40)
    late = wandb.shipper("--stdin", stdin=subprocess.PIPE)
    late.communicate(
        b'{"op":"watch","journal":"%s","base_url":"%s"}\n' % (request.journal.encode(), request.base_url.encode()), 20
    )
    assert late.returncode == 0
    wandb.rows(writer, 0, 10)
    until(lambda: steps(loopback) == list(range(10)), "the rows")


def test_sigterm_flushes_within_two_seconds(loopback: Any, wandb: Any) -> None:
    """Proves that a shipper that is told to stop delivers what it can at once, and ends in time even when the server hangs."""
    writer = wandb.journal(loopback.url)
    process = wandb.shipper()
    until(lambda: wandb.pid() == process.pid, "the shipper")
    assert client.flush(wandb.root, writer.path, 20.0)
    wandb.rows(writer, 0, 3000)
    process.terminate()
    assert process.wait(60) == 0
    assert steps(loopback) == list(range(3000))
    loopback.fault = lambda path, body: time.sleep(60)
    wandb.rows(writer, 3000, 3010)
    process = wandb.shipper()
    until(lambda: wandb.pid() == process.pid, "the shipper")
    began = time.monotonic()
    process.terminate()
    assert process.wait(60) == 0
    assert time.monotonic() - began < 20  # the server hangs for 60


def test_a_flush_of_a_fenced_or_refused_run_says_why(loopback: Any, wandb: Any) -> None:
    """Proves that a client learns at once, not after its time-out, that its run was taken over, or that the server refuses it,
    and that other journals go on."""
    fenced, refused, fine = (wandb.journal(loopback.url, run_id=name) for name in ("r1", "bad", "r3"))
    loopback.fault = lambda path, body: 404 if "/bad/" in path else None
    wandb.shipper()
    for writer in (fenced, refused, fine):
        wandb.rows(writer, 0, 3)
    until(wandb.pid, "the shipper")
    result = client.flush(wandb.root, refused.path, 20.0)
    assert not result
    assert "404" in result.error
    assert "ERROR" in wandb.log()
    assert client.flush(wandb.root, fine.path, 20.0) or "fenced" in wandb.log()
    loopback.attempt, loopback.nonce = 9, "other"
    wandb.rows(fenced, 3, 6)
    result = client.flush(wandb.root, fenced.path, 20.0)
    assert not result
    assert result.error.startswith("fenced: attempt 9")
    unknown = call(wandb.root, Request("dance"), 5.0)
    assert "unknown request 'dance'" in unknown.error


def test_attempts_begin_in_order(loopback: Any, wandb: Any) -> None:
    """Proves that a newer attempt begins only when everything the older one left is on the server: it may build upon it."""
    first = wandb.journal(loopback.url, attempt=1, place="run-z")  # found last
    wandb.rows(first, 0, 3000)
    first._release()  # as if killed: no END, the lock gone
    first.close = lambda *_: None
    second = wandb.journal(loopback.url, attempt=2)
    wandb.rows(second, 3000, 3010)
    second.close(0)
    client.watch(wandb.root, second.path, loopback.url, "k" * 40)
    assert client.flush(wandb.root, second.path, 20.0), wandb.log()
    assert steps(loopback, 1) == list(range(3000))
    assert steps(loopback, 2) == list(range(3000, 3010))
    assert loopback.marks == ["begin 1", "ended lost", "begin 2", "complete 0", "ended exit"]


def test_offline_runs_and_feeds_are_left_alone(loopback: Any, wandb: Any) -> None:
    """Proves that the shipper touches neither offline journals nor ranks' feeds, nor ones that were shipped already."""
    wandb.journal(loopback.url, run_id="offline", online=False).close(0)
    wandb.journal(loopback.url, run_id="feed", role="feed").close(0)
    done = wandb.journal(loopback.url, run_id="done")
    done.close(0)
    done.path.with_name(done.path.name + ".shipped").write_text("done")
    assert wandb.shipper().wait(90) == 0
    assert loopback.requests == []


def test_it_leaves_after_the_grace_time(loopback: Any, wandb: Any) -> None:
    """Proves that a shipper whose server stays away, with no writer left, leaves after the grace time, and delivers the
    rest when it is started again."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 10)
    writer.close(0)
    loopback.stop()
    assert wandb.shipper("--grace", "0.5").wait(90) == 0
    assert "wbdist sync" in wandb.log()
    loopback.start()
    assert client.flush(wandb.root, writer.path, 20.0)
    assert steps(loopback) == list(range(10))


def test_a_stranger_in_the_runtime_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a runtime directory others could write to is refused, not used."""
    from wbdist.errors import InitStartError
    from wbdist.run.shipper import control

    monkeypatch.setattr(control.tempfile, "gettempdir", lambda: str(tmp_path) if len(str(tmp_path)) <= 60 else "/tmp")
    monkeypatch.setattr(control.os, "getuid", lambda: 12345)
    control_directory = Path(control.tempfile.gettempdir()) / "wbdist-shipper-12345"
    control_directory.mkdir(mode=0o777)
    try:
        with pytest.raises(InitStartError, match="mode 0700"):
            control.runtime_directory()
    finally:
        control_directory.rmdir()


def test_journals_of_this_disk_under_another_host_name(loopback: Any, wandb: Any) -> None:
    """Proves that a journal written before this machine (a pod with its volume) got another name is found and shipped, and that
    its writer's death is told by the lock, not by the name."""
    writer = wandb.journal(loopback.url, host="the-name-before")
    wandb.rows(writer, 0, 5)
    writer._release()  # as if killed: no END, the lock gone
    writer.close = lambda *_: None
    wandb.shipper()
    until(lambda: "ended lost" in loopback.marks, "the rows and the loss")
    assert [row["i"] for row in loopback.history()] == list(range(5))


@pytest.mark.parametrize("line", [b'{"error":"unknown request \'standing\'; known are ping, watch, flush"}', b"what?", b"[]"])
def test_a_shipper_that_does_not_understand_has_said_nothing(wandb: Any, line: bytes) -> None:
    """Proves that a shipper of another version, which may serve a root when wbdist is upgraded, stops no job: its refusal of a
    question is not taken for the server's word that another attempt has the run."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(socket_path(wandb.root)))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(line + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert client.standing(wandb.root, wandb.root / "rank0.a1.wbdj") == client.Standing()
        thread.join(60)
    socket_path(wandb.root).unlink()
