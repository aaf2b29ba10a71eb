"""A short way to say what is stored, for tests of the store."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

from wbdist.core.position import HISTORY, Watermark
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt
from wbdist.server.store import SqlStore
from wbdist.server.store.interface import Appended, RunFields, RunRow

NOW = 1_000.0


class StoredRun:
    """One run in a store."""

    def __init__(self, store: SqlStore, run_id: str = "r", *, entity: str = "e", project: str = "p") -> None:
        self.store = store
        self.pk = store.upsert_run(entity, project, run_id, RunFields(), NOW)[0].pk

    @property
    def row(self) -> RunRow:
        found = self.store.get_run_by_pk(self.pk)
        assert found is not None
        return found

    def begin(
        self, attempt: int, base: Watermark | None = None, *, nonce: str | None = None, writer: str = "w", now: float = NOW
    ) -> BegunAttempt:
        return self.store.begin_attempt(self.pk, BeginAttempt(attempt, nonce or f"n{attempt}", writer, base), now)

    def append(
        self,
        attempt: int | None,
        seq: int,
        lines: Sequence[Any],
        *,
        stream: str = HISTORY,
        nonce: str | None = None,
        writer: str = "w",
        now: float = NOW,
    ) -> Appended:
        """Lines that are no text yet are written as the wandb SDK would."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        if attempt is None:
            return self.store.append(self.pk, {stream: (seq, texts)}, now)
        named = f"n{attempt}" if nonce is None else nonce
        return self.store.append(self.pk, {stream: (seq, texts)}, now, attempt=attempt, nonce=named, writer=writer)

    def history(self, **where: Any) -> list[dict[str, Any]]:
        return self.store.history(self.pk, **where)

    def steps(self, **where: Any) -> list[int]:
        return [row["_step"] for row in self.history(**where)]


def rows(steps: Sequence[int] | range, **values: Any) -> list[dict[str, Any]]:
    """Rows at these steps; a callable value is called with the step."""
    return [{"_step": s, **{key: value(s) if callable(value) else value for key, value in values.items()}} for s in steps]


def cut(attempt: int, lines: int, *, writer: str = "w", stream: str = HISTORY, step: int | None = None) -> Watermark:
    """The base after `lines` lines of one writer."""
    return Watermark(attempt, {stream: {writer: lines}}, lines - 1 if step is None else step)


def exactly(value: Any) -> Any:
    """A value that equals another's only if type and bits are the same: 1 is not 1.0 nor True, -0.0 not 0.0, NaN is NaN."""
    if isinstance(value, float):
        return ("nan",) if math.isnan(value) else ("float", struct.pack("<d", value))
    if isinstance(value, dict):
        return ("dict", {key: exactly(item) for key, item in value.items()})
    if isinstance(value, list):
        return ("list", [exactly(item) for item in value])
    return (type(value).__name__, value)
