"""Keys at rest: hashes of API keys, the secret that signs sessions and file addresses, and the admin's key in its own file."""

from __future__ import annotations

import fcntl
import hashlib
import secrets
import string
from collections.abc import Callable
from pathlib import Path

import msgspec

from wbdist.disk import replace_private
from wbdist.errors import UsageError

ADMIN_KEY_FILE = "admin.key"
AUTH_FILE = "auth.json"
_ALPHABET = string.ascii_letters + string.digits
_KEY_LENGTH = 48
"""W&B's client refuses keys under 40 characters. No '-': it would take what stands before for a prefix."""


class StoredKey(msgspec.Struct, frozen=True):
    """A key is 285 random bits, so a plain SHA-256 hides it; there is nothing to guess that a slow hash would protect."""

    sha256: str
    name: str
    entity: str
    admin: bool = False
    teams: tuple[str, ...] = ()
    """Entities that its owner is a member of, beside his own."""


class KeyRing(msgspec.Struct, frozen=True):
    """Everything in auth.json."""

    secret: str
    """Signs sessions and file addresses; replacing it ends them all."""
    keys: list[StoredKey]
    version: int = 1
    public: tuple[str, ...] = ()
    """entity/project of those that every user may read."""


def digest(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def open_key_ring(data_dir: Path, entity: str) -> KeyRing:
    """Reads <data_dir>/auth.json, made on first use; call it only under the server's lock.

    <data_dir>/admin.key (mode 0600) holds the admin's key and has the last word: deleting it and starting the server
    again replaces the key, and a key put there by hand is taken. Raises UsageError for a file that makes no sense.
    """
    path = data_dir / AUTH_FILE
    ring = read_key_ring(data_dir) if path.exists() else None
    admin = StoredKey(sha256=digest(_admin_key(data_dir)), name="admin", entity=entity, admin=True)
    others = [key for key in ring.keys if key.name != admin.name] if ring else []
    renewed = KeyRing(
        secret=ring.secret if ring else secrets.token_hex(32), keys=[admin, *others], public=ring.public if ring else ()
    )
    if renewed != ring:
        replace_private(path, msgspec.json.format(msgspec.json.encode(renewed)), synced=True)
    return renewed


def read_key_ring(data_dir: Path) -> KeyRing:
    """As it lies there. Raises UsageError when there is none, or it makes no sense."""
    path = data_dir / AUTH_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=KeyRing)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: no server was ever started there; start one with `wbdist server`") from None
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is not a key file ({error}); restore it, or delete it to make new keys") from error


def change_key_ring(data_dir: Path, change: Callable[[KeyRing], KeyRing]) -> None:
    """Replaces the key ring by what `change` makes of it, alone; a running server takes it over with the next request."""
    with (data_dir / f".{AUTH_FILE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ring = read_key_ring(data_dir)
        replace_private(data_dir / AUTH_FILE, msgspec.json.format(msgspec.json.encode(change(ring))), synced=True)


def new_key() -> str:
    """A fresh API key."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_KEY_LENGTH))


def _admin_key(data_dir: Path) -> str:
    path = data_dir / ADMIN_KEY_FILE
    if not path.exists():
        replace_private(path, new_key().encode() + b"\n", synced=True)
    key = path.read_text().strip()
    if len(key) < 40 or not all(char in _ALPHABET + "_-" for char in key):
        raise UsageError(f"{path} must hold one key of at least 40 characters of [A-Za-z0-9_-]; delete it to get a new one")
    path.chmod(0o600)
    return key
