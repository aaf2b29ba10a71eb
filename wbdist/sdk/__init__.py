"""W&B's `wandb.sdk`, as far as scripts use it: `wandb.sdk.lib.runid.generate_id`."""

from __future__ import annotations

from wbdist.sdk import lib

__all__ = ["lib"]
