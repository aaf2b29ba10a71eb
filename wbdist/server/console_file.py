"""`output.log` as a file of a run: what its processes printed, as the live view has it.

W&B's client uploads such a file at its end, which then counts (as does that somebody deleted it). Nobody else has to: the
lines are here already, also those of a run that was killed, and cut where its attempts are.
"""

from __future__ import annotations

import hashlib
import re
import threading
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from wbdist.core.position import CONSOLE
from wbdist.server.store.files import FileVersion

if TYPE_CHECKING:
    from wbdist.server.context import AppContext
    from wbdist.server.store.interface import RunRow

LINE: Final = re.compile(
    r"(?P<error>ERROR )?(?P<ts>\d{4}-\d\d-\d\dT[\d:.]{8,15}) (?P<said>(?:\[(?P<label>[^\]]{1,64})\] )?(?P<text>.*))", re.DOTALL
)
"""A line as W&B's client sends it: `[ERROR ]TIME [label] text`; anything else is text without a time."""
_AT_ONCE = 5000


class ConsoleFiles:
    """Their sizes and digests, kept until the run changes. Thread-safe."""

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int | None, int], FileVersion] = OrderedDict()

    def of(self, ctx: AppContext, run: RunRow) -> FileVersion | None:
        """The file as it is now; None for a run that printed nothing, or that has a file of this name, or had it deleted.

        Reads all lines, the first time.
        """
        lines = run.line_counts.get(CONSOLE, 0)
        if not lines or ctx.store.files.newest(run, CONSOLE) is not None:
            return None
        key = (run.pk, run.view, run.version)
        with self._lock:
            found = self._known.get(key)
        if found is None:
            size, digest = 0, hashlib.md5(usedforsecurity=False)
            for part in contents(ctx, run, lines):
                size += len(part)
                digest.update(part)
            found = FileVersion(
                name=CONSOLE,
                sha256="",
                md5=b64encode(digest.digest()).decode(),
                size=size,
                mimetype="text/plain",
                updated_at=run.heartbeat_at,
            )
            with self._lock:
                self._known[key] = found
                while len(self._known) > self._size:
                    self._known.popitem(last=False)
        return found


def contents(ctx: AppContext, run: RunRow, lines: int) -> Iterator[bytes]:
    """The first `lines` lines in portions, without their times, as they were printed."""
    for first in range(0, lines, _AT_ONCE):
        found = ctx.store.console(run.pk, first=first, limit=min(_AT_ONCE, lines - first), attempt=run.view)
        yield "".join(f"{_said(line)}\n" for line in found).encode(errors="replace")


def _said(line: str) -> str:
    match = LINE.fullmatch(line)
    return (line if match is None else match["said"]).rstrip("\n")
