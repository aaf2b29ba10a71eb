"""Acceptance of seed S4, forking: one test a row, read back through the API."""

from __future__ import annotations

from typing import Any

import pytest
from support.seeding import Seeds, shown

import wbdist as wandb

pytestmark = pytest.mark.usefixtures("here")


def source(rows: int = 300) -> None:
    with wandb.init(id="src") as run:
        for i in range(rows):
            run.log({"metric": i})


def facts_of(path: str) -> Any:
    """All that the API says of a run, for comparisons."""
    run = wandb.Api().run(path)
    lines = [line.content for line in run.console_logs()]
    return [
        run.name,
        run.state,
        run.rawconfig,
        run.summary_metrics,
        run.heartbeat_at,
        lines,
        list(run.scan_history()),
        run.attempts(),
    ]


def test_fork_from_a_step(project: str) -> None:
    """Proves a new id that begins at step 201 behind the rows 0..200 of the source, which stays as it was to the last byte."""
    source()
    before = facts_of(f"{project}/src")
    with wandb.init(fork_from="src?_step=200") as run:
        assert (run.id != "src", run.step, run.starting_step, run.resumed) == (True, 201, 201, False)
        run.log({"metric": -1})
    assert facts_of(f"{project}/src") == before
    assert shown(f"{project}/{run.id}", "metric") == [(i, i) for i in range(201)] + [(201, -1)]
    assert [(one.id, one.step, one.kind) for one in wandb.Api().run(f"{project}/{run.id}").lineage()] == [
        ("src:1", 200, "fork")
    ]


def test_source_goes_on(seeds: Seeds, project: str) -> None:
    """Proves that a running source can be forked, goes on, and that the fork does not get its later rows."""
    original = wandb.init(id="src", reinit="create_new")
    for i in range(10):
        original.log({"metric": i})
    assert original.flush(20)
    forked = wandb.init(fork_from="src?_step=4", reinit="create_new")
    for i in range(10, 20):
        original.log({"metric": i})
        forked.log({"metric": -i})
    original.finish()
    forked.finish()
    found = {run["id"]: [(row["_step"], row["metric"]) for row in run["rows"]] for run in seeds.runs("wandb", project)}
    assert found["src"] == [(i, i) for i in range(20)]
    assert found[forked.id] == [(i, i) for i in range(5)] + [(5 + i, -10 - i) for i in range(10)]


def test_an_archived_incarnation_is_forked(project: str) -> None:
    """Proves that the immutable id of what a rewind has archived is a source like any other."""
    source(rows=20)
    with wandb.init(resume_from="src?_step=5") as run:
        run.log({"metric": "new"})
    with wandb.init(fork_from="src:1?_step=15", id="old") as forked:
        forked.log({"metric": "fork"})
    assert shown(f"{project}/old", "metric") == [(i, i) for i in range(16)] + [(16, "fork")]
    assert shown(f"{project}/src", "metric") == [(i, i) for i in range(6)] + [(6, "new")]


def test_same_metrics_go_on_and_new_ones_begin(project: str) -> None:
    """Proves that `scan_history(keys=...)` of the fork covers the old metric from 0, and the new one behind the branch only."""
    source(rows=50)
    with wandb.init(fork_from="src?_step=29", id="forked") as run:
        for i in range(30, 60):
            run.log({"metric": i, "additional_metric": i * 1.1})
    found = wandb.Api().run(f"{project}/forked")
    assert [row["metric"] for row in found.scan_history(keys=["metric"])] == list(range(60))
    assert [row["additional_metric"] for row in found.scan_history(keys=["additional_metric"])] == [
        i * 1.1 for i in range(30, 60)
    ]
    assert [row["_step"] for row in found.history(keys=["metric"], pandas=False)] == list(range(60))


def test_fork_of_a_fork(project: str) -> None:
    """Proves three levels of forks, each with the rows of those below up to where it left them."""
    source(rows=10)
    expected = [(i, i) for i in range(10)]
    for level, (name, below, step) in enumerate((("one", "src", 7), ("two", "one", 9), ("three", "two", 8)), start=1):
        with wandb.init(fork_from=f"{below}?_step={step}", id=name) as run:
            for i in range(4):
                run.log({"metric": 100 * level + i})
        expected = expected[: step + 1] + [(step + 1 + i, 100 * level + i) for i in range(4)]
        assert shown(f"{project}/{name}", "metric") == expected
    assert [one.run for one in wandb.Api().run(f"{project}/three").lineage()] == ["two", "one", "src"]


def test_a_fork_has_an_id_of_its_own(project: str) -> None:
    """Proves that a fork under the source's id is refused, and one under an id that is taken."""
    source(rows=10)
    wandb.init(id="taken").finish()
    before = facts_of(f"{project}/src")
    with pytest.raises(wandb.UsageError, match="name the same run"):
        wandb.init(fork_from="src?_step=5", id="src")
    with pytest.raises(wandb.UsageError, match="exists"):
        wandb.init(fork_from="src?_step=5", id="taken")
    assert facts_of(f"{project}/src") == before
    assert shown(f"{project}/taken", "metric") == []


def test_the_source_is_deleted(project: str) -> None:
    """Proves that a fork outlives its source: the rows that it shares with it stay."""
    source(rows=10)
    with wandb.init(fork_from="src?_step=5", id="forked") as run:
        run.log({"metric": -1})
    wandb.Api().run(f"{project}/src").delete()
    assert [run.id for run in wandb.Api().runs(f"local/{project}")] == ["forked"]
    assert shown(f"{project}/forked", "metric") == [(i, i) for i in range(6)] + [(6, -1)]
