"""What W&B's client says of itself in headers."""

from __future__ import annotations

from starlette.requests import HTTPConnection


def is_shared(request: HTTPConnection) -> bool:
    """Whether it is one of several processes that write to one run (`mode="shared"`): they count lines each from 0."""
    return request.headers.get("x-wandb-use-async-filestream", "").lower() == "true"


def shared_writer(request: HTTPConnection) -> str:
    """The writer that lines of a shared run belong to; '' for a client that writes alone."""
    client = request.headers.get("x-wandb-async-client-id", "")
    return f"sdk-{client[:100]}" if client and is_shared(request) else ""
