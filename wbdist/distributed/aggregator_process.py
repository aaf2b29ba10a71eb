"""Rank 0's hold on its aggregator: start it, start it again when it was killed, wait for its end."""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from wbdist.distributed.aggregator import Plan, Started
from wbdist.distributed.channel import Meeting
from wbdist.distributed.lateness import LatePolicy
from wbdist.distributed.opening import Opened, error_of
from wbdist.errors import InitStartError, JournalCorruptError
from wbdist.run.journal import JournalReader
from wbdist.run.lifecycle import RunSpec

log = logging.getLogger("wbdist.distributed")

MAX_RESTARTS = 5


class AggregatorDownError(InitStartError):
    """It did not come up, and did not say why."""


class AggregatorProcess:
    """On rank 0 only. One thread at a time."""

    def __init__(self, spec: RunSpec, world_size: int, *, alone_on_host: bool, late: LatePolicy | None = None) -> None:
        """`spec`: of the one run. `alone_on_host`: all ranks are on this machine, so nobody else needs to reach it."""
        self._spec = spec
        self._world_size = world_size
        self._late = late
        self._key = secrets.token_bytes(32)
        self._host = "127.0.0.1" if alone_on_host else reachable_address()
        self._journals: list[str] = []
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """0 before the start."""
        return 0 if self._process is None else self._process.pid

    @property
    def journal(self) -> Path | None:
        """The newest one's journal; None before the start."""
        return Path(self._journals[-1]) if self._journals else None

    def start(self, timeout: float) -> Opened:
        """Starts it; returns when it listens and the run is open. Blocks at most `timeout` seconds. Raises what opening the run
        raised there, AggregatorDownError when it does not come up."""
        return self._start(0, timeout)

    def restart(self, generation: int, timeout: float) -> Opened:
        """Starts the next one when the one before has ended. Blocks at most `timeout` seconds a try. Raises InitStartError when
        MAX_RESTARTS are used up."""
        if self._process is not None:
            # Its connection broke: if it lives all the same it must not write beside its successor.
            self._process.kill()
            self._process.wait()
        problem = f"it was lost {self._starts} times"
        while self._starts <= MAX_RESTARTS:
            log.warning("the aggregator of run %s was lost; start %d of %d", self._spec.run_id, self._starts, MAX_RESTARTS)
            try:
                return self._start(generation, timeout)
            except InitStartError as error:
                problem = str(error)
        raise InitStartError(problem)

    def wait(self, timeout: float) -> None:
        """Reaps it when it ends within `timeout` seconds."""
        if self._process is not None:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                log.warning("the aggregator (pid %d) is still at work; it ends by itself", self._process.pid)

    def _began(self) -> float:
        """When the first one began; 0 when this is the first, or nobody can tell."""
        if not self._journals:
            return 0.0
        try:
            with JournalReader.open(self._journals[0]) as reader:
                return reader.header.created
        except (JournalCorruptError, OSError):
            return 0.0

    def _start(self, generation: int, timeout: float) -> Opened:
        spec = self._spec
        # One that died before it listened has a journal too, so every start is a writer of its own.
        writer = f"rank0.{self._starts}" if self._starts else "rank0"
        self._starts += 1
        plan = Plan(
            spec=msgspec.structs.replace(
                spec,
                writer=writer,
                capture_console=False,
                sample="nothing",
                must_be_new=spec.must_be_new and not self._journals,
                began=self._began(),
            ),
            world_size=self._world_size,
            parent=os.getpid(),
            key=self._key,
            host=self._host,
            late=self._late,
            earlier=tuple(self._journals),
        )
        # A session of its own: Ctrl-C and signals to the job's process group are for the ranks; it takes their last rows.
        process = subprocess.Popen(
            [sys.executable, "-m", "wbdist.distributed.aggregator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=_environment(),
        )
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.msgpack.encode(plan))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended; its answer, or the lack of one, says why
        told = _read_all(process.stdout.fileno(), time.monotonic() + timeout)
        process.stdout.close()
        if told is None:
            process.kill()
            process.wait()
            raise AggregatorDownError(f"the aggregator of run {spec.run_id} did not come up within {timeout:.0f} s")
        if not told:
            raise AggregatorDownError(
                f"the aggregator of run {spec.run_id} ended with code {process.wait()} before it listened"
            )
        started = msgspec.json.decode(told, type=Started)
        if started.error:
            process.wait()
            raise error_of(started.error_class)(started.error)
        self._journals.append(started.journal)
        return Opened(
            meeting=Meeting(address=started.address, key=self._key, generation=generation),
            url=started.url,
            name=started.name,
            entity=started.entity,
            project=started.project,
        )


def reachable_address() -> str:
    """An address of this machine that the ranks of other machines can reach."""
    name = os.environ.get("MASTER_ADDR") if os.environ.get("RANK") == "0" else None
    return socket.gethostbyname(name or socket.gethostname())


def _environment() -> dict[str, str]:
    """Ours, with the package found as here, also from a source checkout."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _read_all(descriptor: int, deadline: float) -> bytes | None:
    """Everything up to the end of the pipe; None when the deadline comes first."""
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(descriptor, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None
