"""Acceptance of seed S3, rewinding: one test a row, read back through the API."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from support.seeding import Seeds, shown

import wbdist as wandb
from wbdist.core.position import EVENTS

pytestmark = pytest.mark.usefixtures("here")


def source(run_id: str = "src", rows: int = 300, **arguments: Any) -> None:
    with wandb.init(id=run_id, **arguments) as run:
        run.define_metric("peak", summary="max")
        for i in range(rows):
            run.log({"metric": i, "peak": i % 250})
        print(f"a line of {run_id}")


def test_resume_from_a_step(seeds: Seeds, project: str) -> None:
    """Proves that a 300-row run that is rewound to step 200 has the rows 0..200 and then new ones, under the same id."""
    source()
    with wandb.init(resume_from="src?_step=200") as run:
        assert (run.id, run.step, run.starting_step) == ("src", 201, 201)
        run.log({"metric": -1})
    (found,) = seeds.runs("wandb", project)
    assert [(row["_step"], row["metric"]) for row in found["rows"]] == [(i, i) for i in range(201)] + [(201, -1)]
    assert found["id"] == "src"


def test_summary_is_recomputed(project: str) -> None:
    """Proves that the maximum of discarded rows is not in the summary any more, and that `define_metric` goes on to hold."""
    source()
    assert wandb.Api().run(f"{project}/src").summary["peak"] == {"max": 249}
    with wandb.init(resume_from="src?_step=200") as run:
        assert run.summary["peak"] == {"max": 200}
        run.log({"metric": 7, "peak": 3})
    found = wandb.Api().run(f"{project}/src").summary
    assert (found["peak"], found["metric"]) == ({"max": 200}, 7)


def test_config_is_kept_and_merged(project: str) -> None:
    """Proves that old keys stay, new ones are added, and of a key in both the new value counts."""
    source(config={"kept": 1, "both": "old"}, rows=10)
    with wandb.init(resume_from="src?_step=5", config={"both": "new", "added": 2}) as run:
        run.log({"metric": -1})
    assert wandb.Api().run(f"{project}/src").config == {"kept": 1, "both": "new", "added": 2}


def test_console_begins_anew(project: str) -> None:
    """Proves that the rewound run shows what it prints itself, and that its archive has the old lines."""
    source(rows=10)
    with wandb.init(resume_from="src?_step=5") as run:
        print("a new line")
        run.log({"metric": -1})
    api = wandb.Api()
    texts = [" ".join(line.content for line in api.run(f"local/{project}/{name}").console_logs()) for name in ("src", "src:1")]
    assert ("a new line" in texts[0], "a line of src" in texts[0]) == (True, False)
    assert ("a new line" in texts[1], "a line of src" in texts[1]) == (False, True)


def test_system_metrics_begin_anew(project: str) -> None:
    """Proves that the rewound run shows its own system metrics only, and that its archive has the old ones."""

    def sampled(**arguments: Any) -> None:
        with wandb.init(settings={"x_stats_sampling_interval": 0.1}, **arguments) as run:
            for i in range(10):
                run.log({"metric": i})
            deadline = time.monotonic() + 30
            while not sum(run.position().watermark.counts[EVENTS].values()):
                assert time.monotonic() < deadline, "no sample was taken"
                time.sleep(0.02)

    def samples(path: str) -> list[dict[str, Any]]:
        return list(wandb.Api().run(f"local/{project}/{path}").history(stream="system", pandas=False))

    sampled(id="src")
    old = samples("src")
    assert old
    sampled(resume_from="src?_step=5")
    new = samples("src")
    assert new
    assert min(row["_timestamp"] for row in new) > max(row["_timestamp"] for row in old)
    assert samples("src:1") == old


def test_artifacts_stay_with_their_incarnation(seeds: Seeds, here: Path, project: str) -> None:
    """Proves that what a discarded stretch made is the archived incarnation's, where W&B's client finds it, and still there."""
    (here / "model.txt").write_text("weights")
    with wandb.init(id="src") as run:
        for i in range(10):
            run.log({"metric": i})
        model = wandb.Artifact("model", type="model")
        model.add_file("model.txt")
        run.log_artifact(model)
    with wandb.init(resume_from="src?_step=4") as run:
        run.log({"metric": -1})
    made = "[a.name for a in api.run('local/{}/{}').logged_artifacts()]"
    assert seeds.read("wandb", made.format(project, "src:1")) == ["model:v0"]
    assert seeds.read("wandb", made.format(project, "src")) == []
    assert seeds.read("wandb", f"api.artifact('local/{project}/model:v0').name") == "model:v0"


def test_archive_lineage_and_immutable_ids(project: str) -> None:
    """Proves that two rewinds make a chain of two, and that each incarnation stays what it was under its immutable id."""
    source(rows=30)
    with wandb.init(resume_from="src?_step=20") as run:
        run.log({"metric": "second"})
    before = shown(f"local/{project}/src:1", "metric")
    with wandb.init(resume_from="src?_step=10") as run:
        run.log({"metric": "third"})
    api = wandb.Api()
    found = api.run(f"{project}/src")
    assert [(one.id, one.step, one.kind) for one in found.lineage()] == [("src:2", 10, "rewind"), ("src:1", 20, "rewind")]
    assert before == shown(f"local/{project}/src:1", "metric") == [(i, i) for i in range(30)]
    assert shown(f"local/{project}/src:2", "metric") == [(i, i) for i in range(21)] + [(21, "second")]
    assert shown(f"{project}/src", "metric") == [(i, i) for i in range(11)] + [(11, "third")]
    assert api.run(f"local/{project}/src:1").summary["metric"] == 29
    assert [attempt.rows for attempt in found.attempts()] == [30, 1, 1]


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("src?metric=3", "_step"),
        ("src?_step=-1", "_step"),
        ("src", "_step"),
        ("src?_step=10", "ends with step 9"),
        ("gone?_step=1", "does not exist"),
    ],
)
def test_what_is_refused_changes_nothing(project: str, point: str, message: str) -> None:
    """Proves a clear error for another metric than `_step`, a negative step, none, one beyond the end, and an unknown run."""
    source(rows=10)
    with pytest.raises(wandb.Error, match=message):
        wandb.init(resume_from=point)
    (found,) = wandb.Api().runs(f"local/{project}")
    assert shown(f"{project}/src", "metric") == [(i, i) for i in range(10)]
    assert (found.state, len(found.attempts())) == ("finished", 1)


def test_a_running_source_is_refused(project: str) -> None:
    """Proves that a run that a live process of this machine writes is not rewound under its feet."""
    run = wandb.init(id="src", reinit="create_new")
    for i in range(10):
        run.log({"metric": i})
    with pytest.raises(wandb.Error, match="'src'"):
        wandb.init(resume_from="src?_step=5", reinit="create_new")
    run.log({"metric": 10})
    run.finish()
    assert shown(f"{project}/src", "metric") == [(i, i) for i in range(11)]


def test_only_one_way_to_go_on() -> None:
    """Proves that any two of resume, fork_from and resume_from are refused."""
    point = "src?_step=1"
    for two in ({"resume": "allow", "fork_from": point}, {"resume": True, "resume_from": point}):
        with pytest.raises(ValueError, match="at most one"):
            wandb.init(**two)
    with pytest.raises(ValueError, match="at most one"):
        wandb.init(fork_from=point, resume_from=point)
