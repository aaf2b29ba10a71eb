"""`login`: keep an API key for a server where `init` finds it."""

from __future__ import annotations

from wbdist.errors import AuthenticationError, CommError
from wbdist.protocol import operations
from wbdist.run import backend, credentials
from wbdist.run.connection import Connection
from wbdist.settings import resolve


def login(
    key: str | None = None, host: str | None = None, relogin: bool | None = None, verify: bool = False, timeout: float = 10.0
) -> bool:
    """Whether there is a key for the server (`host`, else the configured one, else the embedded one).

    With `key`: keeps it in ~/.netrc (mode 0600), unless one is there and `relogin` is False. `verify` asks the server, at
    most `timeout` seconds: AuthenticationError when it does not accept the key, CommError when it does not answer.
    """
    settings = resolve(None, {"base_url": host} if host else {})
    server = backend.server_for(settings)
    if key is not None:
        key = credentials.checked(key)
    known = server.api_key if key is None or relogin is False else None
    use = known or key
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
