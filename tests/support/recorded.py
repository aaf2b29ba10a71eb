"""The tables of recorded answers, `tests/preemption/payloads/<provider>.json`: reading them, comparing answers by shape."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import pytest

DIRECTORY = Path(__file__).parents[1] / "preemption" / "payloads"
TABLES = {path.stem: msgspec.json.decode(path.read_bytes()) for path in DIRECTORY.glob("*.json")}


def records(*names: str) -> list[Any]:
    return [pytest.param(name, record, id=f"{name}: {record['name']}") for name in names for record in TABLES[name]["records"]]


FORMATS = {
    "iso": lambda when: datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    "aws": lambda when: datetime.fromtimestamp(when, UTC).strftime("%d %b %Y %H:%M:%S GMT"),
    "rfc": lambda when: formatdate(when, usegmt=True),
    "unix": lambda when: str(int(when)),
}


def now_in(value: Any) -> Any:
    """With times for `@iso+120`."""
    if isinstance(value, str) and (found := re.fullmatch(r"@(\w+)([+-]\d+)", value)):
        return FORMATS[found[1]](time.time() + int(found[2]))
    if isinstance(value, dict):
        return {name: now_in(inner) for name, inner in value.items()}
    return [now_in(inner) for inner in value] if isinstance(value, list) else value


def body_of(answer: dict[str, Any]) -> str:
    body = answer.get("body", "")
    return body if isinstance(body, str) else msgspec.json.encode(now_in(body)).decode()


KINDS = {
    "iso": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
    "rfc": r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT",
    "aws": r"\d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT",
    "uuid": r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}",
}


def shape(value: Any, free: list[str]) -> Any:
    """What must be the same in two answers: fields, types, words, and how times are written."""
    if isinstance(value, dict):
        return {name: "any" if name in free else shape(inner, free) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner, free) for inner in value]
    if isinstance(value, str):
        return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, value)), value)
    return value


def read(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
