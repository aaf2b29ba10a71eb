"""The random number generators of one rank: Python's, NumPy's, torch's on the host and on each CUDA device."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from wbdist.core.mixing import mix64
from wbdist.errors import StateMissingError


def capture() -> dict[str, Any]:
    """The state of every generator this process has loaded. Training thread; neither imports nor starts anything."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = numpy.random.get_state(legacy=False)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> list[str]:
    """Puts every captured generator back; returns what was not plain, as sentences.

    Raises StateMissingError, before any is touched, when the state lacks one that this rank draws from. Devices beside the one
    that it uses may be others: what a rank of a smaller host had of them is not missed.
    """
    loaded = {"python", "torch"} | ({"numpy"} if "numpy" in sys.modules else set())
    # What is there of CUDA tells itself; whether a job moved to another kind of device is a question of its environment.
    if "cuda" in state and torch.cuda.is_available() and torch.cuda.current_device() >= len(state["cuda"]):
        loaded.add(f"cuda:{torch.cuda.current_device()}")
    if missing := sorted(loaded - {*state}):
        raise StateMissingError(
            f"the checkpoint has no state of the random generators {missing}; it has {sorted(state)}. Give each rank the "
            "devices that it had, or start anew in another checkpoint directory."
        )
    notes = []
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy as np

        np.random.set_state(state["numpy"])
    if "cuda" in state:
        saved, present = len(state["cuda"]), torch.cuda.device_count()
        for device in range(min(saved, present)):
            torch.cuda.set_rng_state(state["cuda"][device], device)
        if saved != present:
            notes.append(f"the checkpoint holds the generators of {saved} CUDA devices, this host has {present}")
    return notes


def derive(seed: int, step: int, rank: int) -> None:
    """Seeds every generator from (seed, step, rank): for a rank that the checkpoint does not know."""
    random.seed(mix64(seed, step, rank, 1))
    torch.manual_seed(mix64(seed, step, rank, 2))  # CUDA's too
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(mix64(seed, step, rank, 3) & 0xFFFFFFFF)
