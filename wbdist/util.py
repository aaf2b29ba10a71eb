"""W&B's `wandb.util`, as far as scripts use it."""

from __future__ import annotations

from wbdist.dropin import generate_id

__all__ = ["generate_id"]
