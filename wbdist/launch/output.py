"""Ranks as subprocesses, and their output line by line on one terminal, each line with its rank."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from wbdist.launch.standby import ForkedRank, Standby, StandbyError
from wbdist.launch.worker import command_for

StartOne = Callable[[Mapping[str, str], int, int], "subprocess.Popen[bytes] | ForkedRank"]
"""An environment and the descriptors of both outputs -> a started rank."""

COLOURS = (36, 33, 35, 32, 34, 31)
"""ANSI colours of the rank labels, on a terminal."""
LINE_LIMIT = 1 << 16
"""Longest line kept together, in bytes; a rank that prints no newline must not fill our memory."""
CHUNK = 1 << 16
PROGRESS_EVERY = 1.0
"""Seconds between two lines of a progress bar (text that ends in a carriage return): each would replace the one before on a
terminal of its own, which ranks that share one do not have."""
LAST_LINES = 12
"""Lines of a rank's standard error kept to show with its failure."""


class _Stream:
    """One output stream of one rank: bytes in, whole labelled lines out."""

    def __init__(self, rank: int, source: IO[bytes], sink: IO[bytes], copy: IO[bytes] | None) -> None:
        self.source, self.sink, self.copy = source, sink, copy
        self.last: deque[bytes] = deque(maxlen=LAST_LINES)
        self._open = b""
        self._progress_at = 0.0
        label = f"[rank {rank}]"
        if sink.isatty() and "NO_COLOR" not in os.environ:
            label = f"\x1b[{COLOURS[rank % len(COLOURS)]}m{label}\x1b[0m"
        self._label = label.encode() + b" "

    def feed(self, data: bytes) -> bytes:
        """What can be shown now that `data` came; b"" says that the stream has ended."""
        self._keep(data)
        ending = b"\n" if not data and self._open else b""
        *lines, self._open = (self._open + data + ending).split(b"\n")
        # As on a terminal: what stands after the last carriage return is what a person would have seen.
        shown = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
        if b"\r" in self._open:
            bar = self._open.rstrip(b"\r").rpartition(b"\r")[2]
            self._open = b"\r" + bar + self._open[len(self._open.rstrip(b"\r")) :][:1]
            now = time.monotonic()
            if bar and now - self._progress_at >= PROGRESS_EVERY:
                self._progress_at = now
                shown.append(bar)
        if len(self._open) > LINE_LIMIT:
            shown.append(self._open)
            self._open = b""
        self.last.extend(line for line in shown if line.strip())
        return b"".join(self._label + line + b"\n" for line in shown)

    def _keep(self, data: bytes) -> None:
        if self.copy is None:
            return
        try:
            self.copy.write(data)
        except OSError as error:
            sys.stderr.write(f"wbdist launch: {self.copy.name} ends here: {error}\n")
            self.copy = None

    def close(self) -> None:
        self.source.close()
        if self.copy is not None:
            self.copy.close()


class CommandRanks:
    """Starts one command per rank: `start` is the supervisor's `start_ranks`, `last_lines` its `last_lines`.

    With one rank and no `log_dir` the rank writes straight to our terminal (progress bars, colours); otherwise through pipes,
    which one thread copies. A reader of ours that goes away (`| head`), or a full disk, costs the output, never the job.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        module: bool = False,
        log_dir: Path | None = None,
        standby_after: float | None = None,
    ) -> None:
        """`arguments`: the script (or, with `module`, the module's name) and what it gets. `standby_after`: seconds after which
        a standby process is made that restarted ranks are forked from (not for a module), None for none."""
        self.command = command_for(list(arguments), module=module)
        self._standby = None if standby_after is None or module else Standby(arguments, after=standby_after)
        self._log_dir = log_dir
        self._streams: dict[tuple[int, str], _Stream] = {}
        self._copying: threading.Thread | None = None
        self._deaf: set[int] = set()

    def start(self, environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[bytes] | ForkedRank]:
        """Main thread, when no rank of an earlier attempt is alive. Raises OSError when a process cannot be started, or
        `log_dir` not be written; none is left then."""
        piped = len(environments) > 1 or self._log_dir is not None
        started: list[subprocess.Popen[bytes] | ForkedRank] = []
        if self._standby is not None and self._standby.ready():
            with suppress(StandbyError):
                started = self._start_all(environments, piped, self._fork)
        if not started:
            started = self._start_all(environments, piped, self._execute)
        if self._standby is not None:
            self._standby.begin(environments[0], started[0].pid)
        if piped:
            self._copying = threading.Thread(target=self._copy, args=(list(self._streams.values()),), daemon=True)
            self._copying.start()
        return started

    def _start_all(
        self, environments: Sequence[Mapping[str, str]], piped: bool, start_one: StartOne
    ) -> list[subprocess.Popen[bytes] | ForkedRank]:
        self.join()
        self._streams = {}
        started: list[subprocess.Popen[bytes] | ForkedRank] = []
        try:
            for extra in environments:
                # Unbuffered: what a rank printed must not be lost when it is killed.
                environment = {"PYTHONUNBUFFERED": "1", **os.environ, **extra}
                if not piped:
                    started.append(start_one(environment, 1, 2))
                    continue
                ends = [*os.pipe(), *os.pipe()]
                try:
                    started.append(start_one(environment, ends[1], ends[3]))
                except BaseException:
                    os.close(ends[0])
                    os.close(ends[2])
                    raise
                finally:
                    os.close(ends[1])
                    os.close(ends[3])
                self._connect(ends[0], ends[2], int(extra["RANK"]), int(extra["WBDIST_RESTART"]))
        except BaseException:
            for process in started:
                process.kill()
                process.wait()
            raise
        return started

    def _execute(self, environment: Mapping[str, str], out: int, err: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0
        )

    def _fork(self, environment: Mapping[str, str], out: int, err: int) -> ForkedRank:
        assert self._standby is not None
        return self._standby.fork(environment, out, err)

    def last_lines(self, rank: int) -> list[str]:
        """The end of what `rank` of the last attempt, which has ended, wrote to its standard error. Waits at most a second."""
        self.join()
        stream = self._streams.get((rank, "err"))
        return [] if stream is None else [line.decode(errors="replace") for line in stream.last]

    def join(self) -> None:
        """After an attempt: returns when its output is out; after a second also when some process still holds a pipe."""
        if self._copying is not None:
            self._copying.join(1.0)

    def close(self) -> None:
        """After the last attempt: its output is out (as `join`), and nothing of ours is left running."""
        if self._standby is not None:
            self._standby.close()
        self.join()

    def _connect(self, out: int, err: int, rank: int, restart: int) -> None:
        for name, descriptor, sink in (("out", out, sys.stdout), ("err", err, sys.stderr)):
            source = os.fdopen(descriptor, "rb", buffering=0)
            copy = None
            if self._log_dir is not None:
                self._log_dir.mkdir(parents=True, exist_ok=True)
                copy = (self._log_dir / f"rank-{rank}.{restart}.{name}").open("wb", buffering=0)
            self._streams[rank, name] = _Stream(rank, source, sink.buffer, copy)

    def _copy(self, streams: Sequence[_Stream]) -> None:
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream.source, selectors.EVENT_READ, stream)
            while selector.get_map():
                for key, _ in selector.select():
                    stream = key.data
                    data = os.read(key.fd, CHUNK)
                    self._show(stream.sink, stream.feed(data))
                    if not data:
                        selector.unregister(stream.source)
                        stream.close()

    def _show(self, sink: IO[bytes], text: bytes) -> None:
        if not text or id(sink) in self._deaf:
            return
        try:
            sink.write(text)
            sink.flush()
        except ValueError:  # closed
            self._deaf.add(id(sink))
        except OSError:  # no reader, no terminal any more, disk full
            self._deaf.add(id(sink))
            # What the sink still holds would be written once more when Python ends, whose exit code then were 120.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sink.fileno())
            os.close(nowhere)
