"""The recipes that `Pool` and the feeds stand for, as the standard library has them: what a SIGKILL does to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from support.feeding import REPOSITORY

HANGS = 10.0
"""Seconds after which it is said to hang; each does its work in milliseconds."""

POOL = """
import multiprocessing, os, signal
def work(n):
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return n
with {package}Pool(2{context}) as pool:
    try:
        print(sum(pool.map(work, range(8), chunksize=1)))
    except Exception as error:
        print(type(error).__name__)
"""

QUEUE = """
import fcntl, multiprocessing, struct, termios, time
context = multiprocessing.get_context("fork")
def write(queue, n):
    while True:
        queue.put((n, "x" * 200_000))
queue = context.Queue()
writers = [context.Process(target=write, args=(queue, n), daemon=True) for n in range(2)]
pipe = queue._reader.fileno()
full = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) - 4096  # the length that goes before has a page of its own
writers[0].start()
while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"0000"))[0] < full:
    time.sleep(0.001)
# Now the first is in the middle of its write, under the lock that all writers share.
writers[1].start()
writers[0].kill()
writers[0].join()
for _ in range(50):
    queue.get()
print("goes on", flush=True)
writers[1].kill()
"""


def outcome(text: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        return process.communicate(timeout=HANGS)[0].strip()
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_killed_worker_hangs_the_standard_pool_and_not_ours() -> None:
    """Proves in the same script that multiprocessing.Pool waits for ever for the task of a killed worker, and that ours says
    so."""
    assert outcome(POOL.format(package="multiprocessing.", context="")) == "hangs"
    ours = POOL.format(package="wbdist.", context=', context="fork"').replace("import multiprocessing", "import wbdist")
    assert outcome(ours) == "WorkerLostError"


@pytest.mark.slow
def test_a_killed_writer_hangs_the_queue_recipe() -> None:
    """Proves that the recipe of W&B's documents, one process that logs what others put into a multiprocessing.Queue, hangs
    for good when one of them is killed in a put. (Feeds that are killed: test_rank0.py; pools: test_pool.py.)"""
    assert outcome(QUEUE) == "hangs"
