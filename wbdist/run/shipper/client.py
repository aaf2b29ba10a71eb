"""The training process's side of the shipper: start it, tell it of a journal, ask it to flush."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, sleep

import msgspec

from wbdist.errors import InitStartError
from wbdist.run.shipper.control import Request, call

STARTUP = 10.0
"""Seconds a shipper that was just started may take to answer."""
_STARTS = 3
"""Times a flush starts a shipper that is killed again and again."""
_MARGIN = 2.0
"""Seconds on top of a flush's own timeout for its answer to arrive."""

_started: dict[Path, subprocess.Popen[bytes]] = {}
"""root -> the shipper this process started; kept so that it is reaped if it ends first."""
_watched: dict[Path, Request] = {}
"""journal -> what the shipper was told: a new shipper must be told again, it may not find the key by itself."""


class FlushResult(msgspec.Struct, frozen=True):
    """Outcome of a flush; true when acknowledged. `error` is '' when only the time ran out, and begins with 'fenced' when a
    newer attempt of the run has taken over."""

    acked: bool
    error: str = ""

    def __bool__(self) -> bool:
        return self.acked


def watch(root: Path, journal: Path, base_url: str, api_key: str | None, env: Mapping[str, str] | None = None) -> None:
    """Any process. Tells the root's shipper of a new journal, and starts one when none answers.

    Waits neither for a new shipper nor for any server: a few milliseconds; 1 s at most when a shipper hangs. `root`: the
    `wandb` directory that holds the run directories. `env`: the new shipper's environment, default ours. Raises
    InitStartError when no process can be started, UsageError when `base_url` is no server's address.
    """
    request = _watched[journal] = Request("watch", str(journal.resolve()), base_url, api_key)
    try:
        call(root, request, 1.0)
    except OSError:
        _start(root, request, env)


def flush(
    root: Path,
    journal: Path,
    timeout: float,
    *,
    priority: bool = False,
    files: bool = False,
    env: Mapping[str, str] | None = None,
) -> FlushResult:
    """Waits until the server has acknowledged all that is now in `journal`, at most `timeout` seconds (2 more if it hangs).

    `files`: also the contents of the run's files.

    A dead shipper is started again, a few times, and goes on when this returns. `priority`: before other journals (the run is
    being preempted). Never raises for an absent server: the result then is not acked.
    """
    deadline = monotonic() + timeout
    starts = 0
    told = _watched.get(journal)
    request = Request("flush", str(journal.resolve()), priority=priority, files=files)
    if told is not None:
        request.base_url, request.api_key = told.base_url, told.api_key
    while True:
        request.timeout = rest = max(0.0, deadline - monotonic())
        try:
            reply = call(root, request, rest + _MARGIN)
        except TimeoutError:
            return FlushResult(False, "the shipper does not answer")
        except OSError as error:
            if starts == 0 or (_ended(root) and starts < _STARTS):
                _start(root, told, env)
                starts += 1
            elif rest <= 0 or _ended(root):
                return FlushResult(False, f"no shipper answers ({error}); see {root / 'logs' / 'shipper.log'}")
            sleep(min(0.02, rest))
        else:
            return FlushResult(reply.acked, reply.error)


class Standing(msgspec.Struct, frozen=True):
    """What the server said about a run to whoever writes it."""

    fenced: str = ""
    """'fenced: ...' once another attempt has the run."""
    stopped: bool = False
    """Somebody asked that its process stop."""


def standing(root: Path, journal: Path) -> Standing:
    """What the server has said so far about the run of `journal`. At most a second.

    Starts nothing and raises nothing: nothing was said when no shipper answers, or one of another version that does not
    understand: what it refuses is not the server's word.
    """
    try:
        reply = call(root, Request("standing", str(journal.resolve())), 1.0)
    except (OSError, InitStartError, msgspec.DecodeError):
        return Standing()
    return Standing(reply.error, reply.stopped) if reply.ok else Standing()


def ensure_shipper(root: Path, env: Mapping[str, str] | None = None, timeout: float = STARTUP) -> int:
    """Starts the root's shipper when none answers, and waits until one does. Returns its pid. Raises InitStartError."""
    deadline = monotonic() + timeout
    started = False
    while True:
        try:
            return call(root, Request("ping"), 1.0).pid
        except OSError as error:
            if not started:
                _start(root, None, env)
                started = True
            elif monotonic() > deadline:
                raise InitStartError(
                    f"the shipper of {root} did not answer within {timeout:g} s; see {root / 'logs' / 'shipper.log'}"
                ) from error
            sleep(0.02)


def _ended(root: Path) -> bool:
    """Whether the shipper we started is gone with an error."""
    process = _started.get(root)
    return process is not None and process.poll() not in {None, 0}


def _start(root: Path, request: Request | None, env: Mapping[str, str] | None) -> None:
    environment = dict(os.environ if env is None else env)
    # The shipper must find the very wbdist that runs here, also when it was put on sys.path by hand.
    package = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH", "")]))
    for name in ("PYTHONDEVMODE", "PYTHONPROFILEIMPORTTIME", "COVERAGE_PROCESS_START"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "wbdist.run.shipper", "--root", str(root.resolve()), *(["--stdin"] if request else [])]
    _started.pop(root, None)
    try:
        # A session of its own: signals for the job's process group, and Ctrl-C, must not stop what reports the job's end.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if request else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise InitStartError(f"the shipper cannot be started ({' '.join(command)}): {error}") from error
    _started[root] = process
    if process.stdin is not None and request is not None:
        # A pipe takes this much without anybody reading; the key is then seen neither in `ps` nor in the environment.
        try:
            process.stdin.write(msgspec.json.encode(request) + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            raise InitStartError(f"the shipper ended at once; see {root / 'logs' / 'shipper.log'}") from None


__all__ = ["FlushResult", "Standing", "ensure_shipper", "flush", "standing", "watch"]
