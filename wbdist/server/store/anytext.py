"""Text as it came off the wire, in columns that cannot hold every string.

JSON may hold lone surrogates (no UTF-8 exists for them) and NUL (PostgreSQL refuses it). Such a string is stored as MARK
and its JSON escape; every other string as it is, so that the tables stay readable and comparisons in SQL stay right.
"""

from __future__ import annotations

import json
import re
from typing import Any

import sqlalchemy as sa

MARK = "\x1a"
_AWKWARD = re.compile("[\x00\ud800-\udfff]")


def escape(text: str) -> str:
    """A string that every database and encoder takes; equal strings stay equal."""
    return MARK + json.dumps(text) if text.startswith(MARK) or _AWKWARD.search(text) else text


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    return str(json.loads(text[1:])) if text.startswith(MARK) else text


class AnyText(sa.TypeDecorator[str]):
    """A Text column for strings from clients."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else escape(value)

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else unescape(value)
