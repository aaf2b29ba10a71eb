"""What saves cost, kept with the run: among its system metrics, by time.

Not in the history: seconds differ from one life of a job to the next, and a history must not.
"""

from __future__ import annotations

from wbdist.checkpoint.checkpointer import PendingSave
from wbdist.checkpoint.manifest import Manifest


def of_save(save: PendingSave) -> dict[str, float]:
    """Of a committed save, on this rank: what it took of training, and of this machine's disk.

    `stall_s` is the copy into memory, `waited_s` the wait for a save before, `disk.write_s` the time from there to the commit,
    in the background, and `disk.bytes` what this rank wrote.
    """
    return {
        "checkpoint.step": save.step,
        "checkpoint.stall_s": save.stall_s - save.waited_s,
        "checkpoint.waited_s": save.waited_s,
        "checkpoint.disk.write_s": save.write_s,
        "checkpoint.disk.bytes": save.bytes,
    }


def of_copy(tier: str, manifest: Manifest, seconds: float) -> dict[str, float]:
    """Of a committed checkpoint that is now also at `tier`: `store` (an object store) or `run` (the run's server)."""
    return {
        f"checkpoint.{tier}.step": manifest.step,
        f"checkpoint.{tier}.write_s": seconds,
        f"checkpoint.{tier}.bytes": manifest.bytes,
    }
