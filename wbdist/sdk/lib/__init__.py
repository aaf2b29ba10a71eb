"""W&B's `wandb.sdk.lib`."""

from __future__ import annotations

from wbdist.sdk.lib import runid

__all__ = ["runid"]
