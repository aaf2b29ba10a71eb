"""Fixtures for tests with ranks as real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from job.conftest import jobs, server
from support.feeding import Ranks

__all__ = ["jobs", "server"]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    trial = Ranks(tmp_path / "trial")
    yield trial
    trial.stop()
    left = [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "wbdist.distributed.aggregator" in (process.info["cmdline"] or [])
        and (process.info["environ"] or {}).get("WBDIST_DATA_DIR", "").startswith(str(tmp_path))
    ]
    _, alive = psutil.wait_procs(left, 15)
    for process in alive:
        process.kill()
    assert not alive, "an aggregator outlived its run"
