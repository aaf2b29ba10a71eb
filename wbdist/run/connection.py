"""A client's connection to a server: GraphQL operations over HTTP, with our errors and a deadline on every request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from wbdist.errors import AuthenticationError, AwayError, CommError
from wbdist.protocol.operations import Operation, error_message

if TYPE_CHECKING:
    import requests

_decode = msgspec.json.Decoder().decode
_BUSY = frozenset({408, 425, 429})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class RefusedError(CommError):
    """The server is there and said no (HTTP 4xx): asking again changes nothing."""


class Connection:
    """Any thread, one at a time. Makes no request before `execute`."""

    def __init__(self, base_url: str, api_key: str | None, *, timeout: float = 20.0) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self._timeout = timeout
        self._session: requests.Session | None = None

    def execute(self, operation: Operation, *, timeout: float | None = None) -> dict[str, Any]:
        """The answer's `data`. One try; blocks at most `timeout` seconds (twice: to connect, and between bytes).

        Raises AuthenticationError when the key is not accepted, CommError for every other refusal or failure.
        """
        # Imported here: requests costs more than the rest of an offline run together.
        import requests

        if self._session is None:
            self._session = requests.Session()
            # The environment's proxies must never see a request to this very machine. Giving `auth` explicitly also
            # keeps requests from taking another account's entry out of ~/.netrc.
            self._session.trust_env = not is_loopback(self.base_url)
        url = f"{self.base_url}/graphql"
        try:
            answer = self._session.post(
                url,
                data=operation.body(),
                headers={"Content-Type": "application/json"},
                auth=("api", self.api_key or ""),
                timeout=timeout or self._timeout,
            )
        except requests.Timeout as error:
            raise AwayError(f"{url} did not answer {operation.name} within {timeout or self._timeout:g} s") from error
        except requests.RequestException as error:
            raise AwayError(f"{url} cannot be reached: {_root_cause(error)}") from error
        if answer.status_code == 401:
            given = "the API key given is not accepted" if self.api_key else "no API key is known"
            raise AuthenticationError(f"{self.base_url}: {given}; run `wbdist login`, or set WANDB_API_KEY")
        message = error_message(answer.content)
        if not answer.ok or message:
            error_class = AwayError if is_away(answer.status_code) else RefusedError
            raise error_class(
                f"{self.base_url} refused {operation.name} (HTTP {answer.status_code}): {message or answer.reason}"
            )
        try:
            body = _decode(answer.content)
        except msgspec.DecodeError as error:
            raise CommError(f"{url} is not a W&B or wbdist server: its answer to {operation.name} is not JSON") from error
        data = body.get("data") if isinstance(body, dict) else None
        return data if isinstance(data, dict) else {}

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def is_away(status: int) -> bool:
    """Whether an answer with this HTTP status says that the server cannot now."""
    return status >= 500 or status in _BUSY


def is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in _LOOPBACK


def _root_cause(error: BaseException) -> str:
    """The innermost reason: requests wraps one line of news into five of layers."""
    cause: BaseException = error
    while (below := cause.__cause__ or cause.__context__) is not None:
        cause = below
    return str(cause) or type(cause).__name__
