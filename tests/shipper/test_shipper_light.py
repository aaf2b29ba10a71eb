"""What the shipper process costs beside a training job."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
import wbdist.run.shipper.__main__
from wbdist.run.shipper.remote import Remote
heavy = {"ssl", "_ssl", "_hashlib", "requests", "torch", "numpy", "subprocess", "asyncio"} & set(sys.modules)
assert not heavy, heavy
import http.client
assert not hasattr(http.client, "HTTPSConnection")
assert type(Remote("https://localhost:1", None)._connect()).__name__ == "HTTPSConnection"
"""


def test_no_openssl_for_plain_http() -> None:
    """Proves that the shipper loads neither OpenSSL nor other heavy modules, and has HTTPS all the same when asked."""
    subprocess.run([sys.executable, "-c", PROBE], check=True, timeout=30)
