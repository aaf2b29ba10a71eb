"""Where an API key comes from: the setting, then ~/.netrc, then the embedded server's own key file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from wbdist.disk import replace_private
from wbdist.errors import AuthenticationError, UsageError
from wbdist.settings import Settings

_KEY = re.compile(r"([A-Za-z0-9]+-)?[A-Za-z0-9_\-]{40,}|[\w\-]+\.[\w\-]+\.[\w\-]+")
"""W&B's rule: 40 or more characters after an optional prefix, or a JWT."""

ADMIN_KEY = "admin.key"


def find(settings: Settings, base_url: str, *, embedded: bool) -> str | None:
    """The key for `base_url`, None when none is known. `embedded`: the server is the one of `settings.data_dir`."""
    if settings.api_key:
        return checked(settings.api_key)
    if embedded:
        return admin_key(Path(settings.data_dir))
    return from_netrc(base_url)


def checked(key: str) -> str:
    """`key` without white space around it; AuthenticationError when it cannot be a key (its text is not repeated)."""
    key = key.strip()
    if not _KEY.fullmatch(key):
        raise AuthenticationError(
            f"this cannot be an API key: it has {len(key)} characters, and 40 or more of A-Z a-z 0-9 _ - are expected"
        )
    return key


def admin_key(data_dir: Path) -> str | None:
    """The embedded server's key, readable by its owner alone; None when there is no server here yet."""
    try:
        return (data_dir / ADMIN_KEY).read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise AuthenticationError(
            f"{data_dir / ADMIN_KEY} belongs to another user; set WBDIST_DATA_DIR to a directory of your own"
        ) from error


def netrc_path() -> Path:
    return Path(os.environ.get("NETRC") or Path("~/.netrc").expanduser())


def from_netrc(base_url: str) -> str | None:
    """The password of the machine entry for this server's host, as `wandb login` stores it too."""
    from netrc import NetrcParseError, netrc

    path = netrc_path()
    if not path.exists():
        return None
    try:
        entry = netrc(str(path)).authenticators(urlsplit(base_url).hostname or "")
    except (NetrcParseError, OSError) as error:
        raise AuthenticationError(f"{path} cannot be read: {error}") from error
    return entry[2] if entry else None


def store(base_url: str, key: str) -> Path:
    """Writes the key for this server's host into ~/.netrc (mode 0600), leaving other entries alone. Returns the path."""
    host = urlsplit(base_url).hostname
    if not host:
        raise UsageError(f"{base_url!r} is not a server's address; write it as http://host:port")
    path = netrc_path()
    # Entries in whatever encoding keep their bytes.
    old = path.read_text("utf-8", "surrogateescape") if path.exists() else ""
    # One entry in the form that `wandb login` and this function write: `machine`, then two indented lines.
    without = re.sub(rf"^machine[ \t]+{re.escape(host)}[ \t]*\n(?:[ \t]+.*\n?)*", "", old, flags=re.MULTILINE)
    if re.search(rf"\bmachine\s+{re.escape(host)}\b", without):
        raise UsageError(f"{path} has an entry for {host} in a form that cannot be replaced safely; edit it by hand")
    text = (
        without + ("" if not without or without.endswith("\n") else "\n") + f"machine {host}\n  login user\n  password {key}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_private(path, text.encode("utf-8", "surrogateescape"), synced=True)
    return path
