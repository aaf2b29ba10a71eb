"""Delivery of branches, against a real app and store in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.inprocess import World

from wbdist.run.journal import JournalWriter


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def test_a_fork_goes_on_when_its_source_was_rewound_meanwhile(world: World) -> None:
    """Proves that a branch which has begun is delivered to its end by a shipper that starts after the source was cut to before
    the branch's step: asked anew where it branches off, the server has no such step, and the branch was given up."""
    source = world.journal(1)
    for step in range(5):
        source.append_row({"x": step}, step=step, commit=True, time=world.now)
    fork = world.journal(1, run_id="fork", nonce="f", at_step=3, base_run="r")
    fork.append_row({"x": 40}, step=4, commit=True, time=world.now)
    for journal in (source, fork):
        bring(world, journal)
    bring(world, world.journal(2, at_step=1))
    assert [row["x"] for row in world.rows()] == [0, 1]
    fork.append_row({"x": 50}, step=5, commit=True, time=world.now)
    bring(world, fork)
    assert [row["x"] for row in world.rows(run_id="fork")] == [0, 1, 2, 3, 40, 50]
    run = world.run_called("fork")
    assert run is not None
    assert run.summary["x"] == 50


def bring(world: World, journal: JournalWriter) -> None:
    """By a shipper that begins with this and ends with it."""
    delivery = world.delivery(journal)
    ticket = delivery.ask()
    for _ in range(10):
        delivery.step(world.now)
        world.now += 1.0
    assert not delivery.error
    assert delivery.flushed >= ticket
    delivery.close()
