"""Imported first by the shipper process: `http.client` without OpenSSL, 4 MiB that a server on this network does not need.

Only there: in a training process other libraries want HTTPS from the same `http.client`. `remote` takes the whole one when a
server does speak HTTPS.
"""

from __future__ import annotations

import sys

if "ssl" not in sys.modules and "http.client" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # `import ssl` fails then, for which http.client is prepared
    try:
        import http.client  # noqa: F401
    finally:
        del sys.modules["ssl"]

__all__: list[str] = []
