"""`login`: keep an API key for a server where `init` finds it."""

from __future__ import annotations

from wbdist.errors import AuthenticationError, CommError
from wbdist.protocol import operations
from wbdist.run import backend, credentials
from wbdist.run.connection import Connection
from wbdist.settings import resolve


def login(  # noqa: PLR0917  (W&B's order)
    key: str | None = None,
    relogin: bool | None = None,
    host: str | None = None,
    force: bool | None = None,
    timeout: float = 10.0,
    verify: bool = False,
    referrer: str | None = None,
    prompt: bool = False,
    anonymous: str | None = None,
) -> bool:
    """Whether there is a key for the server (`host`, else the configured one, else the embedded one).

    With `key`: keeps it in ~/.netrc (mode 0600), unless one is there and `relogin` is False. `verify` asks the server, at
    most `timeout` seconds: AuthenticationError when it does not accept the key, CommError when it does not answer. `force`:
    AuthenticationError in place of False. Never asks on the terminal (`prompt`), which `wbdist login` does; the other two are
    W&B's and change nothing.
    """
    del referrer, prompt, anonymous
    settings = resolve(None, {"base_url": host} if host else {})
    server = backend.server_for(settings)
    if key is not None:
        key = credentials.checked(key)
    known = server.api_key if key is None or relogin is False else None
    use = known or key
    if use is None and force:
        raise AuthenticationError(f"there is no API key for {server.base_url}; run `wbdist login`")
    if use is None:
        return False
    if verify:
        viewer = who(server.base_url, use, timeout)
        if viewer is None:
            raise AuthenticationError(f"{server.base_url} does not accept this API key")
    if key is not None and use == key and not server.embedded:
        credentials.store(server.base_url, key)
    return True


def who(base_url: str, key: str | None, timeout: float) -> operations.Viewer | None:
    """Whose key it is; None when the server does not accept it. Raises CommError when it does not answer."""
    connection = Connection(base_url, key, timeout=timeout)
    try:
        return operations.read_viewer(connection.execute(operations.viewer()))
    except AuthenticationError:
        return None
    except CommError as error:
        raise CommError(f"the key cannot be checked: {error}") from error
    finally:
        connection.close()
