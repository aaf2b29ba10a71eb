"""How processes of one host find and speak to the shipper of a root: paths, and one JSON line each way on a Unix socket.

{"op": "ping"}                                              -> {"ok": true, "pid": n}
{"op": "watch", "journal", "base_url", "api_key"}           -> {"ok": true}
{"op": "flush", "journal", "timeout", "priority", "files"}  -> {"acked": bool, "error": str}
{"op": "standing", "journal"}                               -> {"ok": true, "error": "" or "fenced: ...", "stopped": bool}
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Final
from zlib import crc32

import msgspec

from wbdist.errors import InitStartError

SHIPPED: Final = ".shipped"
"""Beside a journal whose end the server has, files and all: later shippers of the root leave it alone. `wbdist sync` does not
mind it."""
MAX_MESSAGE: Final = 1 << 20
_SHORT: Final = 60
"""Longest temporary directory whose sockets fit into the 108 bytes the kernel has for an address."""


class Request(msgspec.Struct, omit_defaults=True):
    op: str
    journal: str = ""
    base_url: str = ""
    api_key: str | None = None
    timeout: float = 0.0
    priority: bool = False
    files: bool = False


class Reply(msgspec.Struct, omit_defaults=True):
    ok: bool = False
    acked: bool = False
    stopped: bool = False
    """Somebody asked on the server that the run's process stop."""
    error: str = ""
    pid: int = 0


def runtime_directory() -> Path:
    """A directory of this user alone, made on first use. Raises InitStartError when somebody else's lies there."""
    temporary = tempfile.gettempdir()
    path = Path(temporary if len(temporary) <= _SHORT else "/tmp") / f"wbdist-shipper-{os.getuid()}"  # noqa: S108
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        found = f"it is {stat.filemode(facts.st_mode)} and belongs to user {facts.st_uid}"
        raise InitStartError(f"{path} must be a directory of yours with mode 0700, but {found}; remove it")
    return path


def socket_path(root: Path) -> Path:
    return runtime_directory() / f"{_name(root)}.sock"


def instance_lock_path(root: Path) -> Path:
    return runtime_directory() / f"{_name(root)}.lock"


def _name(root: Path) -> str:
    # Not hashlib, which brings OpenSSL: 3 MiB in a process that lives beside every job.
    path = os.fsencode(root.resolve())
    return f"{crc32(path):08x}{crc32(path[::-1]):08x}"


def call(root: Path, request: Request, timeout: float) -> Reply:
    """Asks the root's shipper. Raises OSError when none answers within `timeout` seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(str(socket_path(root)))
        connection.sendall(msgspec.json.encode(request) + b"\n")
        line = receive_line(connection)
    if not line:
        raise ConnectionResetError("the shipper closed the connection without an answer")
    return msgspec.json.decode(line, type=Reply)


def receive_line(connection: socket.socket) -> bytes:
    """One line, without its end; b"" when the other side closed first."""
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
        if len(data) > MAX_MESSAGE:
            raise ConnectionError(f"a message of more than {MAX_MESSAGE} bytes")
    return data[:-1]


def send_reply(connection: socket.socket, reply: Reply) -> None:
    connection.sendall(msgspec.json.encode(reply) + b"\n")


def decode_request(line: bytes) -> Request:
    return msgspec.json.decode(line, type=Request)
