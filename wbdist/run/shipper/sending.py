"""What uploads are made of: a question to the server, and a file's bytes, read to the end only if it stays the same."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeVar

import msgspec

from wbdist.protocol import file_stream, operations
from wbdist.run.shipper.remote import Answer, Remote
from wbdist.run.snapshots import key_of

T = TypeVar("T")
_BLOCK = 1 << 20


class ChangedError(Exception):
    """The file was written while it was sent; the server has stored nothing."""


class FailedError(Exception):
    """This cannot be had or is refused, for good."""


class AgainError(Exception):
    """The server cannot take it now."""


class Wire:
    """Requests to one server, with these errors; UnreachableError when it does not answer. Not thread-safe."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def ask(self, operation: operations.Operation, read: Callable[[Mapping[str, Any]], T]) -> T:
        """What `read` makes of the answer."""
        answer = self._remote.post("/graphql", operation.body())
        message = operations.error_message(answer.body)
        if not answer.ok or message:
            raise _problem(operation.name, answer, message)
        try:
            return read(msgspec.json.decode(answer.body)["data"])
        except (ValueError, KeyError, TypeError) as error:
            where = self._remote.base_url
            raise AgainError(f"{where} answers {operation.name} with what is not understood: {error!r}") from error

    def put(self, what: str, url: str, file: IO[bytes], headers: Mapping[str, str]) -> str:
        """The MD5 (base64) of what the server then has. Raises ChangedError, too."""
        sending = _Sending(file)
        answer = self._remote.put(url, sending, sending.size, headers)
        if not (answer.ok or _archived(answer)):
            raise _problem(f"PUT of {what}", answer)
        return sending.digest()


def _archived(answer: Answer) -> bool:
    """Whether our server kept the file, in the archive: a newer attempt has taken over."""
    stamped = file_stream.decode_reply(answer.body).wbdist if answer.status == 409 else None
    return stamped is not None and stamped.code == "fenced"


def _problem(what: str, answer: Answer, message: str = "") -> Exception:
    message = message or operations.error_message(answer.body) or answer.body[:200].decode("utf-8", "replace")
    text = f"the server answers {what} with HTTP {answer.status}: {message}"
    # A key may still come, and an address that is too old is asked for anew.
    final = (answer.ok or not answer.retryable) and answer.status not in {401, 403}
    return FailedError(text) if final else AgainError(text)


class _Sending:
    """A file's bytes, as often as they are iterated. The last block is held back until the file is known to be the same."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sum = _md5()
        self._before = key_of(os.fstat(file.fileno()))
        self.size = self._before[2]

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        self._sum = _md5()
        left = self.size
        while left > 0:
            block = self._file.read(min(_BLOCK, left))
            left -= len(block)
            if not block or (left == 0 and key_of(os.fstat(self._file.fileno())) != self._before):
                raise ChangedError
            self._sum.update(block)
            yield block

    def digest(self) -> str:
        return base64.b64encode(self._sum.digest()).decode()


def digest_of(file: IO[bytes]) -> str:
    """MD5 of the rest of a file, base64."""
    found = _md5()
    while block := file.read(_BLOCK):
        found.update(block)
    return base64.b64encode(found.digest()).decode()


def _md5() -> Any:
    import hashlib  # with OpenSSL: 3 MiB that a shipper without files does not need

    return hashlib.md5(usedforsecurity=False)
