"""What an operator may set about the server, resolved once at start."""

from __future__ import annotations

import msgspec


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, times in seconds."""

    entity: str = "local"
    """Entity of the admin user, and of runs that name none."""
    silence_timeout: float = 300.0
    """A running run that is not heard of for so long is crashed (or preempted, if it was marked)."""
    max_stream_bytes: int = 64 * 2**20
    """W&B's client cuts its file_stream requests at 10 MiB."""
    max_graphql_bytes: int = 32 * 2**20
    """Configs and summaries travel here."""
    max_file_bytes: int = 64 * 2**30
    max_rows: int = 100_000
    """Rows in one answer; more is refused, so that one request cannot fill the memory."""
    session_seconds: float = 30 * 86400.0
    """How long a browser stays logged in."""
    login_token_seconds: float = 900.0
    transfer_seconds: float = 86400.0
    """How long a signed file address works."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names, besides localhost, this machine's own and plain addresses, under which browsers may use their session."""
