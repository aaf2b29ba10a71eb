"""Shared by every test: no test may touch the user's own servers, keys or data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# What passed once passes again; `make test-all` looks for new examples. No deadline: a busy machine is no defect.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("search", database=None, print_blob=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a data directory of its own, and no WANDB_*/WBDIST_*/launcher variables from outside."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "WBDIST_", "TORCHELASTIC_", "SLURM_")) or name in {
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
        }:
            monkeypatch.delenv(name, raising=False)
    # Unbuffered, `print` writes its arguments one by one, and lines of several processes mix.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("WBDIST_DATA_DIR", str(tmp_path / "wbdist-data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
