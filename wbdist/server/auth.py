"""Who is asking: API keys for programs, a cookie session for browsers, signatures for file addresses.

Programs send HTTP Basic (user `api`) or Bearer with an API key. A browser trades a key, or the one-time token of a printed
address, for an HttpOnly, SameSite=Strict cookie; the cookie counts only under a host name that is ours, against DNS
rebinding, and for changes only with an Origin that is ours.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from starlette.requests import HTTPConnection
from starlette.responses import Response

from wbdist.errors import UsageError
from wbdist.server.keys import AUTH_FILE, KeyRing, digest, read_key_ring
from wbdist.server.settings import ServerSettings

_log = logging.getLogger(__name__)
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class User(msgspec.Struct, frozen=True):
    name: str
    entity: str
    """Where runs go that name no entity."""
    admin: bool = False
    """May do everything; so the rest is left empty for him."""
    teams: frozenset[str] = frozenset()
    """Entities that he is a member of, beside his own."""
    public: frozenset[str] = frozenset()
    """entity/project of those that everybody may read."""
    entities: frozenset[str] = frozenset()
    """All that have a user or a member."""


class Auth:
    """Thread-safe. Sessions are signed, not stored, so they survive a restart of the server.

    `data_dir`: where the key ring came from; users that are added there while the server runs are known at once.
    """

    def __init__(
        self, ring: KeyRing, settings: ServerSettings, clock: Callable[[], float], data_dir: Path | None = None
    ) -> None:
        self._users, self._digests = _users_of(ring)
        self._secret = bytes.fromhex(ring.secret)
        self._data_dir = data_dir
        self._changed = self._change_mark()
        self._settings = settings
        self._clock = clock
        self._hosts = frozenset({"localhost", socket.gethostname().lower(), *(host.lower() for host in settings.allowed_hosts)})
        self._tokens: dict[str, tuple[User, float]] = {}
        self._lock = threading.Lock()
        # Browsers share cookies between the ports of a host: a name of our own keeps two servers' sessions apart.
        self.cookie_name = "wbdist_" + hashlib.sha256(self._secret).hexdigest()[:8]

    # Programs -----------------------------------------------------------------------------------------

    def check_key(self, key: str) -> User | None:
        """The key's owner, None when it is not one of ours."""
        self._refresh()
        return self._users.get(digest(key))

    def _change_mark(self) -> int:
        if self._data_dir is None:
            return 0
        with contextlib.suppress(FileNotFoundError):
            return (self._data_dir / AUTH_FILE).stat().st_mtime_ns
        return 0

    def _refresh(self) -> None:
        mark = self._change_mark()
        if mark == self._changed or self._data_dir is None:
            return
        self._changed = mark
        try:
            self._users, self._digests = _users_of(read_key_ring(self._data_dir))
        except UsageError as error:
            _log.error("users stay as they were: %s", error)

    def check_request(self, request: HTTPConnection) -> User | None:
        """The user behind a request, by Authorization header, else by session cookie; None when neither is good."""
        header = request.headers.get("authorization")
        if header is not None:
            key = _presented_key(header)
            return self.check_key(key) if key else None
        return self._check_session(request)

    # Browsers -----------------------------------------------------------------------------------------

    def login(self, key: str) -> str | None:
        """The cookie value for a pasted API key, None when the key is not ours. Give it to `set_cookie`."""
        user = self.check_key(key.strip())
        return None if user is None else self._session(user)

    def login_token(self, user: User) -> str:
        """A token that logs a browser in as `user` once, within `login_token_seconds`; only this process knows it."""
        now = self._clock()
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._tokens = {known: entry for known, entry in self._tokens.items() if entry[1] > now}
            self._tokens[token] = (user, now + self._settings.login_token_seconds)
        return token

    def redeem(self, token: str) -> str | None:
        """The cookie value for a login token, which is void from now on; None for an unknown, used or old one."""
        with self._lock:
            user, until = self._tokens.pop(token, (None, 0.0))
        return self._session(user) if user is not None and until > self._clock() else None

    def set_cookie(self, response: Response, value: str) -> None:
        """Not `Secure`: the embedded server speaks plain HTTP on loopback. Behind TLS the proxy may add it."""
        age = int(self._settings.session_seconds)
        response.set_cookie(self.cookie_name, value, max_age=age, path="/", httponly=True, samesite="strict")

    def clear_cookie(self, response: Response) -> None:
        """Logs the browser out."""
        response.delete_cookie(self.cookie_name, path="/", httponly=True, samesite="strict")

    def own_host(self, request: HTTPConnection) -> bool:
        """Whether the browser came by a name that is ours. A rebinding attack needs a DNS name, so plain addresses pass."""
        host = _host_name("//" + request.headers.get("host", ""))
        return host is not None and (host in self._hosts or _is_address(host))

    def own_origin(self, request: HTTPConnection) -> bool:
        """Whether a page of ours sent the request. Browsers always name the origin of a request that changes something."""
        origin = request.headers.get("origin")
        if origin is None:
            return request.scope.get("method", "GET") in _SAFE_METHODS
        parts = urlsplit(origin)
        return parts.netloc.lower() == request.headers.get("host", "").lower()

    def _session(self, user: User) -> str:
        text = f"{user.name}:{int(self._clock() + self._settings.session_seconds)}"
        return f"{base64.urlsafe_b64encode(text.encode()).decode().rstrip('=')}.{self._sign_session(text)}"

    def _sign_session(self, text: str) -> str:
        # The key's digest is signed along: replacing somebody's key ends their sessions.
        return self.sign("session", text, self._digests.get(text.rpartition(":")[0], ""))

    def _check_session(self, request: HTTPConnection) -> User | None:
        encoded, _, signature = request.cookies.get(self.cookie_name, "").partition(".")
        if not signature or not self.own_host(request) or not self.own_origin(request):
            return None
        try:
            text = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError):
            return None
        if not hmac.compare_digest(signature.encode(), self._sign_session(text).encode()):
            return None
        self._refresh()
        name, _, until = text.rpartition(":")
        return self._users.get(self._digests.get(name, "")) if float(until) > self._clock() else None

    # Signatures ---------------------------------------------------------------------------------------

    def sign(self, *parts: str) -> str:
        """A signature over `parts` in this order, safe in URLs and cookies."""
        message = "".join(f"{len(part)}:{part}" for part in parts)
        return base64.urlsafe_b64encode(hmac.digest(self._secret, message.encode(), "sha256")).decode().rstrip("=")


def _users_of(ring: KeyRing) -> tuple[dict[str, User], dict[str, str]]:
    """Digest of a key -> its owner, and name -> digest."""
    entities = frozenset(entity for key in ring.keys for entity in (key.entity, *key.teams))
    public = frozenset(ring.public)
    users = {}
    for key in ring.keys:
        rights = {} if key.admin else {"teams": frozenset(key.teams), "public": public, "entities": entities}
        users[key.sha256] = User(key.name, key.entity, key.admin, **rights)
    return users, {key.name: key.sha256 for key in ring.keys}


def _presented_key(header: str) -> str | None:
    """The key in an Authorization header; W&B's client sends it as the password of user `api`."""
    scheme, _, value = header.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value or None
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, key = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return key if colon and name == "api" else None


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
