"""HTTP to one server, as light as it gets: one kept connection of the standard library (ADR 0001 has the comparison)."""

from __future__ import annotations

import base64
import http.client
import importlib
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from urllib.parse import urlsplit

import msgspec

from wbdist.errors import UsageError

TIMEOUT = 30.0
"""Seconds without a byte after which a request counts as lost (it is repeated: all our requests may be)."""
MAX_ANSWER = 16 << 20


class UnreachableError(Exception):
    """No answer: refused, reset, timed out. A retry may help."""


class Answer(msgspec.Struct, frozen=True):
    status: int
    body: bytes
    retry_after: float | None = None
    """Seconds the server asks us to wait."""
    api_key: str | None = None
    """The key it was asked with."""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def retryable(self) -> bool:
        """W&B's rule: everything but a fixed list of refusals may be tried again."""
        return self.status not in FINAL


FINAL = frozenset({400, 401, 402, 403, 404, 405, 409, 410, 413, 422, 501})


class Remote:
    """Not thread-safe. Blocks at most `TIMEOUT` a read or write."""

    def __init__(self, base_url: str, api_key: str | None, data_dir: str = "") -> None:
        """`data_dir`: of an embedded server, which may come back on another port; it is then looked for there."""
        self._data_dir = data_dir
        self.api_key = api_key
        self._connection: http.client.HTTPConnection | None = None
        self._put_connection: http.client.HTTPConnection | None = None
        self._put_place = ("", "", 0)
        self._aim(base_url)

    def _aim(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")
        url = urlsplit(self.base_url)
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise UsageError(f"{base_url!r} is not a server's address; write it as http://host:port")
        self._https = url.scheme == "https"
        self._host = url.hostname
        self._port = url.port or (443 if self._https else 80)
        self._prefix = url.path

    def post(self, path: str, body: bytes) -> Answer:
        """One POST of JSON. Raises UnreachableError."""
        while True:
            reused = self._connection is not None
            try:
                answer = self._post(path, body)
                if answer.ok or not self._is_strangers():
                    return answer
                if self._has_moved():
                    continue
                raise UnreachableError(f"{self.base_url} is another server's now, and the one of {self._data_dir} does not run")
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if reused and not isinstance(error, TimeoutError):
                    continue  # the server closed the idle connection meanwhile: that says nothing about the server
                if self._has_moved():
                    continue
                raise UnreachableError(f"{self.base_url} does not answer: {str(error) or type(error).__name__}") from error

    def put(self, url: str, body: Iterable[bytes], size: int, headers: Mapping[str, str]) -> Answer:
        """One PUT of `size` bytes to an address that authenticates itself. Raises UnreachableError, and what `body` raises:
        the server then has an incomplete request. `body` may be iterated twice."""
        parts = urlsplit(url)
        place = (parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        sent = {"User-Agent": "wbdist-shipper", **headers, "Content-Length": str(size)}
        while True:
            reused = self._put_place == place and self._put_connection is not None
            if not reused:
                self._close_put()
                self._put_place = place
            try:
                connection = self._put_connection = self._put_connection or _open(*place)
                connection.request("PUT", target, body, sent)
                response = connection.getresponse()
                data = response.read(MAX_ANSWER)
                if response.will_close or not response.isclosed():
                    self._close_put()
                return Answer(response.status, data, _seconds(response.getheader("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                self._close_put()
                if reused and not isinstance(error, TimeoutError):
                    continue
                raise UnreachableError(f"{parts.netloc} does not take a file: {str(error) or type(error).__name__}") from error
            except BaseException:
                self._close_put()  # in the middle of a request
                raise

    def _close_put(self) -> None:
        if self._put_connection is not None:
            self._put_connection.close()
            self._put_connection = None

    def _is_strangers(self) -> bool:
        """Whether who answers is not the embedded server: that one has died or moved, and others took its port."""
        if not self._data_dir:
            return False
        from wbdist.run import backend  # a shipper whose server stays where it is does without

        data_dir = Path(self._data_dir)
        return backend.last_url(data_dir) != self.base_url or not backend.alive(data_dir)

    def _has_moved(self) -> bool:
        """Whether the embedded server says another address than the one we know; that one is used from now on."""
        if not self._data_dir:
            return False
        from wbdist.run import backend

        url = backend.last_url(Path(self._data_dir))
        if url is None or url == self.base_url:
            return False
        self.close()
        self._aim(url)
        return True

    def close(self) -> None:
        self._close_put()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post(self, path: str, body: bytes) -> Answer:
        if self._connection is None:
            self._connection = self._connect()
        key = self.api_key
        credentials = base64.b64encode(f"api:{key or ''}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}", "User-Agent": "wbdist-shipper"}
        self._connection.request("POST", self._prefix + path, body, headers)
        response = self._connection.getresponse()
        data = response.read(MAX_ANSWER)
        if response.will_close or not response.isclosed():
            self.close()
        return Answer(response.status, data, _seconds(response.getheader("Retry-After")), key)

    def _connect(self) -> http.client.HTTPConnection:
        return _open("https" if self._https else "http", self._host, self._port)


def _open(scheme: str, host: str, port: int) -> http.client.HTTPConnection:
    if scheme != "https":
        # Never through a proxy, which would need absolute targets: servers beyond the local network speak HTTPS.
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    if not hasattr(http.client, "HTTPSConnection"):  # see without_ssl
        importlib.reload(http.client)
    from urllib.request import getproxies, proxy_bypass  # 1 MiB that a local server does not need

    proxy = None if is_loopback(host) or proxy_bypass(host) else getproxies().get("https")
    if proxy is None:
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT)
    via = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    connection = http.client.HTTPSConnection(via.hostname or "", via.port or 3128, timeout=TIMEOUT)
    connection.set_tunnel(host, port)
    return connection


def is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")


def _seconds(header: str | None) -> float | None:
    """`Retry-After`: seconds, fractions allowed, or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except ValueError:
        return None
