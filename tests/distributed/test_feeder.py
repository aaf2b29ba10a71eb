"""A rank's feed when there is no aggregator, and finding one fails."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from wbdist.distributed.channel import Meeting
from wbdist.distributed.feeder import Feeder
from wbdist.errors import EnvironmentFault, UsageError
from wbdist.run.journal import JournalHeader, JournalWriter

HEADER = JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n", writer="feed0", role="feed")
LONG = 200.0
"""Seconds: nobody waits for so long in this test."""


@pytest.mark.parametrize("error", [EnvironmentFault("no aggregator can be had"), UsageError("closed"), OSError("no process")])
def test_who_waits_learns_at_once_that_there_will_be_no_aggregator(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Proves that whatever goes wrong on the feeder's thread ends every wait for it, with the reason, and is logged."""

    def fail(_generation: int) -> Meeting | None:
        raise error

    with JournalWriter.create(tmp_path / "feed0.a1.wbdj", HEADER) as writer, caplog.at_level(logging.ERROR):
        feeder = Feeder(writer.path, 0, None, fail, lambda: writer.size)
        began = time.monotonic()
        for _ in range(2):  # the second asks when all is over
            with pytest.raises(EnvironmentFault, match=str(error)):
                feeder.drain(3, LONG)
        assert not feeder.complete(LONG)
        assert time.monotonic() - began < LONG / 2
    assert str(error) in caplog.text
