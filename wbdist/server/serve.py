"""One server process: opens everything, serves until a signal, closes everything."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import unquote, urlsplit

import msgspec
import uvicorn

from wbdist.disk import replace_private
from wbdist.errors import EnvironmentFault, UsageError
from wbdist.server import datadir, sessions
from wbdist.server.app import create_app, version
from wbdist.server.auth import Auth, User
from wbdist.server.context import AppContext
from wbdist.server.files import FileStore
from wbdist.server.keys import open_key_ring
from wbdist.server.settings import ServerSettings
from wbdist.server.store import open_store
from wbdist.server.unfinished import Unfinished

_log = logging.getLogger(__name__)
_PORTS_TO_TRY = 100
HEAD_SECONDS = 20.0
"""How long the head of a request may take to come."""
_GRACE = 3
"""Seconds that requests in flight get after SIGTERM."""


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8420
    """0: any free one. A taken one: the next free one."""
    database: str | None = None
    """SQLAlchemy URL; None: SQLite in the data directory."""
    files: str | None = None
    """Folder for run files; None: in the data directory."""
    port_file: Path | None = None
    settings: ServerSettings = ServerSettings()


class Announcement(msgspec.Struct, frozen=True):
    """What is true when the server accepts connections."""

    url: str
    login_url: str
    data_dir: Path
    asked_port: int
    port: int


def serve(options: ServeOptions, announce: Callable[[Announcement], None]) -> None:
    """Blocks until SIGTERM or SIGINT (then stops within a few seconds); main thread only.

    `announce` is called once, when connections are accepted and server.json and the port file are written. Raises
    DataDirInUseError, UsageError or EnvironmentFault before anything is served.
    """
    files = files_folder(options.data_dir, options.files)
    with _handling_stops(_exit_quietly):
        _serve_locked(options, files, announce)


def _serve_locked(options: ServeOptions, files: Path, announce: Callable[[Announcement], None]) -> None:
    held = datadir.lock(options.data_dir)
    try:
        listener, port = listen(options.host, options.port)
        with listener:
            ring = open_key_ring(options.data_dir, options.settings.entity)
            url = _url(options.host, port)
            settings = options.settings
            auth = Auth(
                ring,
                msgspec.structs.replace(settings, allowed_hosts=(*settings.allowed_hosts, options.host)),
                time.time,
                options.data_dir,
            )
            store = open_store(options.database or f"sqlite:///{(options.data_dir / 'wbdist.db').absolute()}")
            try:
                ctx = AppContext(store, auth, FileStore(files), settings, time.time, url)
                token = auth.login_token(User("admin", settings.entity, admin=True))
                said = Announcement(url, sessions.login_url(url, token), options.data_dir, options.port, port)
                _run(ctx, listener, options, said, announce)
            finally:
                store.close()
    finally:
        datadir.remove_address(options.data_dir)
        held.release()


def _run(
    ctx: AppContext,
    listener: socket.socket,
    options: ServeOptions,
    said: Announcement,
    announce: Callable[[Announcement], None],
) -> None:
    def listening() -> None:
        address = datadir.ServerAddress(said.url, os.getpid(), time.time(), version())
        datadir.write_address(options.data_dir, address)
        if options.port_file is not None:
            replace_private(options.port_file, said.url.encode() + b"\n", synced=False)
        announce(said)

    config = uvicorn.Config(
        create_app(ctx),
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_GRACE,
        timeout_keep_alive=65,
        server_header=False,
    )
    # uvicorn stops on SIGTERM and SIGINT and then raises them again: being told to stop is no failure of a server.
    with _handling_stops(lambda *_: None):
        AnnouncingServer(config, listening, ctx.on_stop).run(sockets=[listener])


@contextlib.contextmanager
def _handling_stops(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _exit_quietly(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


class AnnouncingServer(uvicorn.Server):
    """Tells when it really accepts connections (uvicorn's lifespan events come before that), and closes those on which the head
    of a request does not come within `head_seconds`."""

    def __init__(
        self,
        config: uvicorn.Config,
        listening: Callable[[], None],
        on_stop: Sequence[Callable[[], None]],
        head_seconds: float = HEAD_SECONDS,
    ) -> None:
        super().__init__(config)
        self._unfinished = Unfinished(head_seconds)
        self._listening = listening
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # a tick is a tenth of a second
            closed = self._unfinished.close_stale(self.server_state.connections, time.monotonic())
            if closed:
                _log.info("%d connections closed on which no request came to the end of its head", closed)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for stop in self._on_stop:
            stop()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> tuple[socket.socket, int]:
    """A listening socket and its port: `port`, or the next free one above it. Raises UsageError for a bad host."""
    try:
        family, _, _, _, _ = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}; use an address or name of this machine, like 127.0.0.1") from None
    last = port if port == 0 else min(65535, port + _PORTS_TO_TRY)
    for candidate in range(port, last + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        # A restarted server must get its port back while old connections linger; Linux still refuses a second listener.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                continue
            raise UsageError(f"cannot listen on {host} port {candidate}: {error.strerror}") from None
        return listener, int(listener.getsockname()[1])
    raise EnvironmentFault(f"ports {port} to {last} on {host} are all taken; choose another with --port, or --port 0 for any")


def _url(host: str, port: int) -> str:
    """The address to print: one that works on this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def files_folder(data_dir: Path, files: str | None) -> Path:
    """Where the contents of runs' files lie; `files` as in ServeOptions. Raises UsageError."""
    if files is None:
        return data_dir / "files"
    parts = urlsplit(files)
    if parts.scheme in {"", "file"} and not parts.netloc:
        return Path(unquote(parts.path)) if parts.scheme else Path(files)
    raise UsageError(f"--files {files}: object stores are not built yet; give a local folder, or leave it out")
