"""Fetching one file from a server: whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from wbdist.errors import AwayError, CommError
from wbdist.run.connection import is_away, is_loopback

if TYPE_CHECKING:
    import requests

_BLOCK = 1 << 20


def digest(path: Path) -> str:
    """MD5 of a file, base64: W&B's name for its contents. Raises OSError."""
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, _md5).digest()).decode()


def download(url: str, target: Path, md5: str, timeout: float = 30.0) -> None:
    """`target` holds the contents when this returns, and holds them whole or not at all before. Any thread.

    `url` authenticates itself. `md5` ('' or '0': unknown) is checked. Blocks at most `timeout` seconds between bytes. Raises
    AwayError when nobody answers to the end, CommError when the contents are not there or not as told, OSError for the disk.
    """
    import requests  # costs more than an offline run

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with requests.Session() as session, temporary.open("wb") as file:
            session.trust_env = not is_loopback(url)
            with session.get(url, stream=True, timeout=timeout) as answer:
                if not answer.ok:
                    error_class = AwayError if is_away(answer.status_code) else CommError
                    raise error_class(f"{_shown(url)} answers HTTP {answer.status_code}: {answer.text[:200]}")
                found = _receive(answer, file)
        if md5 not in {"", "0", found}:
            raise CommError(f"{_shown(url)} sent other contents than announced (MD5 {found} instead of {md5}); try again")
        temporary.replace(target)
    except requests.RequestException as error:
        raise AwayError(f"{_shown(url)} cannot be read: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _receive(answer: requests.Response, file: IO[bytes]) -> str:
    found = _md5()
    for block in answer.iter_content(_BLOCK):
        file.write(block)
        found.update(block)
    return base64.b64encode(found.digest()).decode()


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def _shown(url: str) -> str:
    """Without its signature."""
    return url.partition("?")[0]
