"""Whether the ranks that do not read through rank 0's eyes see the same checkpoint.

Rank 0 verifies every byte, which holds for all ranks of its kernel: they read the same pages. On another host the same
path may be a stale cache of the shared file system, or a disk of its own; there one rank verifies what that host's ranks read.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import msgspec

from wbdist.checkpoint.manifest import Manifest, verify
from wbdist.core.coordination import Coordinator
from wbdist.errors import CheckpointCorruptError

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_OWN = re.compile(r"(?:rank|history)-(\d+)/")


def doubts(coordinator: Coordinator, name: str, manifest: Manifest, timeout: float) -> str:
    """All ranks, in step, after rank 0 has verified: what is wrong with `manifest` as other ranks see it; '' for nothing.

    The same answer on all ranks. Blocks at most `timeout` seconds a meeting, of which there is one where all ranks are of one
    host; besides, for as long as reading takes. Raises PeerLostError.
    """
    rank = coordinator.rank
    views = [word.decode() for word in coordinator.gather(f"{name}/views", _view(Path(manifest.directory)).encode(), timeout)]
    if len({*views}) == 1:
        return ""
    problem = ""
    if views[rank] != views[0] and views.index(views[rank]) == rank:
        here = {other for other, view in enumerate(views) if view == views[rank]}
        try:
            verify(manifest, lambda file: _reads(here, file))
        except CheckpointCorruptError as error:
            problem = f"rank {rank} on {socket.gethostname()}: {error}"
    told = coordinator.gather(f"{name}/doubts", msgspec.msgpack.encode(problem), timeout)
    return "; ".join(word for word in (msgspec.msgpack.decode(word, type=str) for word in told) if word)


def _view(directory: Path) -> str:
    """The same for processes that read the same pages when they read `directory`; of nobody else where that cannot be told."""
    try:
        found = directory.stat()
        return f"{_BOOT.read_text().strip()} {found.st_dev} {found.st_ino}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()} alone"


def _reads(ranks: set[int], file: str) -> bool:
    """Whether one of `ranks` reads `file`: what is shared, and what was its own."""
    own = _OWN.match(file)
    return own is None or int(own[1]) in ranks
