"""What the launcher's tests run as a rank: plain Python, so that it starts in 20 ms. The first argument says what it does.

Every mode first writes <rank>.<restart>.pid into the working directory when it is ready.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from wbdist.launch import intent

RANK, RESTART = int(os.environ["RANK"]), int(os.environ["WBDIST_RESTART"])
HANG = 60.0


def ready() -> None:
    temporary = Path(f".{RANK}.{RESTART}")
    temporary.write_text(str(os.getpid()))
    temporary.rename(f"{RANK}.{RESTART}.pid")


def helper() -> int:
    """A child that does not care about us or about SIGTERM, as a stuck DataLoader worker; its pid."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


def ignore(*numbers: int) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def say(code: int, message: str = "") -> None:
    intent.write(RANK, intent.Verdict(intent.word_for(code), code, message))


def saves(got: list[int]) -> None:
    """As a job: notes the signal, then saves and leaves with 75."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda number, _: got.append(number))


def main() -> int:
    mode, *rest = sys.argv[1:]
    if mode == "saves":
        got: list[int] = []
        saves(got)
        ready()
        deadline = time.monotonic() + HANG
        while not got and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)  # a second copy of the signal would have come by now
        Path(f"{RANK}.{RESTART}.got").write_text(" ".join(signal.Signals(number).name for number in got))
        say(75, "saved")
        return 75
    if mode == "stubborn":
        ignore(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
        helper()
        ready()
        time.sleep(HANG)
    if mode == "plain":
        ready()
        time.sleep(HANG)
    if mode == "codes":  # codes 0,75: this rank's exit code
        return int(rest[0].split(",")[RANK])
    if mode == "dies-at-start":  # dies-at-start RANK: the others hang and do not care
        if int(rest[0]) == RANK:
            print("no such file: weights.bin", file=sys.stderr)
            return 1
        ignore(signal.SIGTERM)
        ready()
        time.sleep(HANG)
    if mode == "until" and rest[0] != str(RESTART):  # until RESTART [idle]: crashes in the attempts before, after a commit
        if RANK == 0 and "idle" not in rest:
            intent.write_progress(RESTART * 10)
        while "idle" not in rest and intent.read_progress(Path(os.environ[intent.VARIABLE])) < 0:
            time.sleep(0.005)  # a commit needs all ranks
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "preempted-once":
        if RESTART == 0:
            say(75)
            return 75
        print("cause:", os.environ["WBDIST_CAUSE"])
    if mode == "waits-once":  # the first attempt waits to be killed
        ready()
        if RESTART == 0:
            time.sleep(HANG)
    if mode == "leaves-helper":
        Path(f"{RANK}.helper").write_text(str(helper()))
        ready()
    if mode == "prints":  # prints LINES: in awkward pieces
        for line in range(int(rest[0])):
            text = f"rank {RANK} line {line} " + "x" * (37 * (line % 7)) + " end\n"
            for start in range(0, len(text), 50):
                os.write(1, text[start : start + 50].encode())
        os.write(2, b"last words without a newline")
    if mode == "bar":
        for percent in range(101):
            os.write(2, f"\r{percent:3d}%|{'#' * (percent // 10)}".encode())
        os.write(2, b"\n")
    if mode == "facts":
        print("argv", sys.argv[1:], "main", __name__, "file", Path(__file__).name, "path", sys.path[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
