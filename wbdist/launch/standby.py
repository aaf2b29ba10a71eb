"""A process that has torch imported and nothing else, from which the ranks of a restarted attempt are forked.

    supervisor                     standby                           rank
    starts it with the job    ->   sleeps `after` seconds, reads from
                                   /proc which libraries a rank
                                   has loaded, imports those
                                   "ready", or leaves: unsafe
    a restart: environment,   ->   forks a child that forks the rank
    output pipes                   and ends at once             ->   the supervisor's own child (it is the
                                                                     subreaper then), told by its pid; then
                                                                     becomes the script (script.py)

So a rank is a fresh process, a child of the supervisor as any other, and what becomes of the standby afterwards does not matter
to it. Whatever is wrong with the standby (killed, stopped, slow, unsafe, another kernel) costs the ranks a cold start, nothing
else. Fork is safe only where nothing but memory is inherited: a standby that has a thread, an open device or any descriptor
which it did not have before its imports leaves instead of getting ready.

Only what is known to read nothing of a rank's identity when it is imported is imported here (IMPORTS): a module that reads RANK
then would have another's. The environment is the ranks' own but for what differs between ranks and starts.

Rejected: CLONE_PARENT, which glibc and Python do not know of; ranks that are the standby's children, which would die with it;
importing what the script imports, which runs other people's module code at another time and in another process than they think.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wbdist.launch import times

IMPORTS = {
    "_multiarray_umath": ("numpy",),
    "libtorch_cpu": ("torch", "torch.distributed", "torch.nn.parallel", "torch.utils.data", "wbdist.job"),
}
"""What a rank has mapped -> what is imported for it."""
PER_RANK = ("RANK", "LOCAL_RANK", "MASTER_PORT")
PER_START = (
    *times.PER_START,
    "WBDIST_CAUSE",
    "WBDIST_INCARNATION",
    "WBDIST_INTENT_DIR",
    "WBDIST_LAUNCHER_PID",
    "WBDIST_RESTART",
)
PATIENCE = 5.0
"""Seconds for a rank to be forked; it takes 10 ms."""
LOOKING = 60.0
"""Seconds that the standby looks for a rank's torch before it leaves: there is nothing worth keeping warm."""
HEADSTART = 0.25
"""Seconds that ranks wait at most for rank 0 to listen. One that finds nobody there would try again after 0.3 to 0.7 s."""
ROOM = 4096
"""Bytes by which a rank's environment may be longer than the standby's and still be shown in /proc."""
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
READY = b"ready\n"
HEAD = 8
"""Bytes that say how long a request is."""


class StandbyError(Exception):
    """Ranks cannot be forked now; start them cold."""


class ForkedRank:
    """A rank that was forked for us; the interface of `subprocess.Popen` that a supervisor needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Standby:
    """The supervisor's end. Main thread."""

    def __init__(self, script: Sequence[str], *, after: float) -> None:
        """`script`: its path and arguments. `after`: seconds from the first start of ranks until the imports begin."""
        self._script, self._after = list(script), after
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._ready = False

    def begin(self, environment: Mapping[str, str], rank: int) -> None:
        """With an attempt's ranks: `environment` is one's (additions to ours), `rank` the pid of one. Only once."""
        if self._process is not None or not sys.platform.startswith("linux"):
            return
        common = {name: value for name, value in environment.items() if name not in (*PER_RANK, *PER_START)}
        self._line, theirs = socket.socketpair()
        # As a rank is started, but for its output: warnings of imports were printed by the ranks themselves.
        command = [sys.executable, str(Path(__file__).with_name("standby_main.py")), *self._script]
        room = " " * ROOM
        facts = {"room": room, "line": theirs.fileno(), "after": self._after, "rank": rank, "parent": os.getpid()}
        self._process = subprocess.Popen(
            command,
            env={"PYTHONUNBUFFERED": "1", **os.environ, **common, "WBDIST_STANDBY": json.dumps(facts)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
        theirs.close()

    def ready(self) -> bool:
        """Whether ranks can be forked now; does not block."""
        if self._line is None:
            return False
        if not self._ready and select.select([self._line], [], [], 0)[0]:
            with suppress(OSError):
                self._ready = self._line.recv(len(READY)) == READY
            if not self._ready:
                self.close()
        return self._ready

    def fork(self, environment: Mapping[str, str], out: int, err: int) -> ForkedRank:
        """One rank with `environment` (all of it) and the descriptors `out` and `err`. At most PATIENCE seconds.

        Raises StandbyError; the standby is closed and no such rank is left then.
        """
        if self._line is None:
            raise StandbyError("the standby process is gone")
        try:
            _prctl(PR_SET_CHILD_SUBREAPER, 1)
            self._line.settimeout(PATIENCE)
            request = json.dumps(dict(environment)).encode()
            socket.send_fds(self._line, [len(request).to_bytes(HEAD, "big")], [out, err])
            self._line.sendall(request)
            pid = int.from_bytes(_exactly(self._line, HEAD), "big")
            if not _is_child(pid):
                raise StandbyError(f"the forked rank {pid} is not our child")
            return ForkedRank(pid)
        except OSError as error:
            self.close()
            raise StandbyError(f"the standby process did not fork a rank: {error}") from error
        except StandbyError:
            self.close()
            raise
        finally:
            with suppress(OSError):
                _prctl(PR_SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        """Ends it. Idempotent."""
        if self._line is not None:
            self._line.close()
            self._line = None
        self._ready = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _exactly(line: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = line.recv(length - len(data))
        if not part:
            raise StandbyError("the standby process is gone")
        data += part
    return data


def _is_child(pid: int) -> bool:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1]) == os.getpid()
    except OSError:
        return False


def _prctl(option: int, value: int | bytes) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


# The process itself -------------------------------------------------------------------------------------


def serve() -> dict[str, Any]:
    """The standby's life. Returns only in ranks, which are to become the script: their environment."""
    facts = json.loads(os.environ.pop("WBDIST_STANDBY"))
    line = socket.socket(fileno=facts["line"])
    line.set_inheritable(False)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != facts["parent"]:
        os._exit(0)
    before = _descriptors()
    if not _warm_up(line, facts["rank"], facts["after"]) or _unsafe(before):
        os._exit(0)
    gc.collect()
    gc.freeze()  # a collection in a rank must not copy every page that it shares with us
    _prctl(PR_SET_NAME, b"wbdist-standby")
    line.sendall(READY)
    while True:
        try:
            head, descriptors, _, _ = socket.recv_fds(line, HEAD, 2)
            environment = json.loads(_exactly(line, int.from_bytes(head, "big"))) if head else None
        except (OSError, StandbyError):
            environment = None
        if environment is None:
            os._exit(0)
        child = os.fork()
        if child == 0:
            middle = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == middle:
                time.sleep(0.0002)
            _become_rank(environment, descriptors, line)
            return dict(environment)
        os.waitpid(child, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _warm_up(line: socket.socket, rank: int, after: float) -> bool:
    """After `after` seconds, and when the process `rank` has mapped torch: imports for what it has mapped. False when the
    supervisor or that rank is gone, or when a minute has shown that it does without."""
    deadline = time.monotonic() + after + LOOKING
    while not select.select([line], [], [], after)[0] and time.monotonic() < deadline:
        after = 0.5
        try:
            maps = Path(f"/proc/{rank}/maps").read_text(errors="replace")
        except OSError:
            return False
        if "libtorch_cpu" in maps:
            for library, modules in IMPORTS.items():
                if library in maps:
                    for module in modules:
                        importlib.import_module(module)
            return True
    return False


def _descriptors() -> set[str]:
    return {f"{name} {_link(name)}" for name in os.listdir("/proc/self/fd") if _link(name)}  # noqa: PTH208


def _link(name: str) -> str:
    try:
        return str(Path(f"/proc/self/fd/{name}").readlink())
    except OSError:
        return ""  # the one that listed the others


def _unsafe(before: set[str]) -> bool:
    """Whether a fork would inherit more than memory: threads, devices, files."""
    torch = sys.modules["torch"]
    return len(os.listdir("/proc/self/task")) > 1 or _descriptors() != before or torch.cuda.is_initialized()  # noqa: PTH208


def _become_rank(environment: Mapping[str, str], descriptors: Sequence[int], line: socket.socket) -> None:
    """What a fresh process has, in a forked one; then tells the supervisor."""
    from wbdist.launch.worker import tie_to_parent

    os.setpgid(0, 0)
    for descriptor, target in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    _show(environment)
    _prctl(PR_SET_NAME, f"wbdist-rank-{environment['RANK']}".encode())
    gc.unfreeze()
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.write_through:
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    # Python reseeds `random` after a fork; these would be the same in every rank.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    if "multiprocessing.process" in sys.modules:
        process: Any = sys.modules["multiprocessing.process"]
        process.current_process().authkey = os.urandom(32)
    tie_to_parent()
    line.sendall(os.getpid().to_bytes(HEAD, "big"))
    line.close()
    if environment["RANK"] != "0":
        _await_listener(int(environment["MASTER_PORT"]))


def _show(environment: Mapping[str, str]) -> None:
    """Makes /proc/<pid>/environ, which tells people and tools whose process this is, a rank's: the block that the standby was
    started with is written over. Nobody points into it any more, since os.environ was filled anew."""
    words = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(words[47]), int(words[48])
    block = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    if 0 < start < start + len(block) <= end:
        ctypes.memmove(start, block.ljust(end - start, b"\0"), end - start)


def _await_listener(port: int) -> None:
    """Until somebody listens on `port`, at most HEADSTART seconds."""
    deadline = time.monotonic() + HEADSTART
    wanted = f":{port:04X} "
    while time.monotonic() < deadline:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with suppress(OSError), open(table) as lines:
                for entry in lines:
                    words = entry.split()
                    if len(words) > 3 and (words[1] + " ").endswith(wanted) and words[3] == "0A":
                        return
        time.sleep(0.002)
