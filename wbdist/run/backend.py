"""Where an online run goes: the configured server, or the embedded one of the data directory, started on demand."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from wbdist.errors import EnvironmentFault, InitStartError
from wbdist.run import credentials
from wbdist.settings import Settings

SERVER_FILE = "server.json"
"""{"url", "pid", ...}: written by a server into its data directory once it listens."""
LOCK_FILE = "start.lock"
LOG_FILE = "server.log"
PROBE_SECONDS = 2.0
POLL_SECONDS = 0.02
_HEALTH = 4096
"""Bytes of an answer to GET /healthz that are looked at."""


_started: list[subprocess.Popen[bytes]] = []
"""Servers this process started; kept so that one that ends first is reaped, and that their going on is no warning."""


class Server(msgspec.Struct, frozen=True):
    """A server to talk to."""

    base_url: str
    api_key: str | None
    embedded: bool


class _ServerFile(msgspec.Struct):
    url: str
    pid: int = 0


class _Health(msgspec.Struct):
    pid: int = 0
    """An older server does not tell."""


def server_for(settings: Settings) -> Server:
    """The configured server (not contacted here), or the embedded one, running.

    Blocks at most `settings.init_timeout` seconds. Safe from any number of processes at once: exactly one starts the
    server. Raises InitStartError when it does not come up, AuthenticationError for a key that cannot be one.
    """
    if settings.base_url:
        return Server(settings.base_url, credentials.find(settings, settings.base_url, embedded=False), embedded=False)
    url = embedded_url(Path(settings.data_dir), settings.init_timeout)
    return Server(url, credentials.find(settings, url, embedded=True), embedded=True)


def embedded_url(data_dir: Path, timeout: float) -> str:
    """URL of the data directory's server, started when none runs. Raises InitStartError naming its log."""
    deadline = time.monotonic() + timeout
    if url := running(data_dir):
        return url
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _start_lock(data_dir, deadline):
            if url := running(data_dir):  # another process was faster
                return url
            return _start(data_dir, deadline)
    except OSError as error:
        raise InitStartError(f"the embedded server cannot be started in {data_dir}: {error}") from error


def running(data_dir: Path) -> str | None:
    """URL of the server that serves `data_dir` now, None when there is none. At most about 2 s."""
    found = _server_file(data_dir)
    return found.url if found is not None and healthy(found.url, found.pid) else None


def last_url(data_dir: Path) -> str | None:
    """URL that the data directory's server said last; it may not run any more. Asks nobody."""
    found = _server_file(data_dir)
    return None if found is None else found.url


def alive(data_dir: Path) -> bool:
    """Whether the process lives that was the data directory's server last (not one that waits to be reaped). Asks nobody."""
    found = _server_file(data_dir)
    if found is None:
        return False
    try:
        pidfd = os.pidfd_open(found.pid)
    except OSError:
        return False
    try:
        ended, _, _ = select.select([pidfd], [], [], 0)
    finally:
        os.close(pidfd)
    return not ended


def _server_file(data_dir: Path) -> _ServerFile | None:
    try:
        found = msgspec.json.decode((data_dir / SERVER_FILE).read_bytes(), type=_ServerFile)
    except (OSError, msgspec.DecodeError):
        return None
    found.url = found.url.rstrip("/")
    return found


def healthy(url: str, pid: int = 0) -> bool:
    """Whether a server answers GET /healthz with 200, the process `pid` if given (0: any) and if it tells: another directory's
    may have the port of one that died. http.client, since it knows no proxies."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        said = msgspec.json.decode(answer.read(_HEALTH), type=_Health) if pid else _Health()
        return answer.status == http.HTTPStatus.OK and said.pid in {0, pid}
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _start_lock(data_dir: Path, deadline: float) -> Iterator[None]:
    """Held by the one process that starts the server; the kernel frees it when that process dies."""
    descriptor = os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InitStartError(
                        f"another process holds {data_dir / LOCK_FILE} and its server did not come up in time; "
                        f"see {data_dir / LOG_FILE}"
                    ) from None
                time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _start(data_dir: Path, deadline: float) -> str:
    log_path = data_dir / LOG_FILE
    port_file = data_dir / f"url.{os.getpid()}"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "wbdist", "server", "--data-dir", str(data_dir), "--port-file", str(port_file)]
    with log_path.open("ab") as log:
        # A session of its own: neither Ctrl-C nor the end of this job reaches it; other runs may be using it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=data_dir,
            env=_server_environment(),
        )
    _started.append(process)
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if (url := port_file.read_text().strip()) and healthy(url):
                    return url.rstrip("/")
            if process.poll() is not None:
                # It may have found another server on this directory that was just starting by hand.
                if other := running(data_dir):
                    return other
                raise InitStartError(
                    f"the embedded server ended with code {process.returncode}: {_last_line(log_path)} (see {log_path})"
                )
            time.sleep(POLL_SECONDS)
        raise InitStartError(f"the embedded server did not come up in time; see {log_path}")
    finally:
        port_file.unlink(missing_ok=True)


def _server_environment() -> dict[str, str]:
    """Ours without what belongs to the job: a server outlives it. The package is found as here, also from a source checkout."""
    kept = {
        name: value for name, value in os.environ.items() if name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS"}
    }
    root = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])])
    return kept


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError as error:
        return str(error)
    return lines[-1] if lines else "it said nothing"


def try_server(settings: Settings) -> tuple[Server | None, str]:
    """As `server_for`; a machine's fault comes back as its text, not as an exception: the journal is enough to go on."""
    try:
        return server_for(settings), ""
    except EnvironmentFault as error:
        return None, str(error)
