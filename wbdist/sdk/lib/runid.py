"""W&B's `wandb.sdk.lib.runid`."""

from __future__ import annotations

from wbdist.dropin import generate_id

__all__ = ["generate_id"]
