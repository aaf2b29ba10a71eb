"""W&B's own SDK, unmodified, logs to our server and reads it back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.waiting import until

from wbdist.server.store import open_store

pytest.importorskip("wandb")


TRAIN = """
import wandb
run = wandb.init(project="p", id="first", name="First", group="g1", job_type="train", tags=["t"], notes="n",
                 config={"lr": 0.1, "opt": {"name": "sgd"}})
for i in range(50):
    loss = {3: float("nan"), 4: float("inf"), 5: float("-inf")}.get(i, 1 / (i + 1))
    run.log({"loss": loss, "d": {"a": i, "b": {"c": 2 * i}}})
print("hello from training")
run.summary["best"] = 7
run.finish()
"""

COLUMNS = "[row['x'] for row in r.scan_history()], [row['_step'] for row in r.scan_history()]"

READ = """(lambda r: {
    "state": r.state, "config": r.config, "summary": {k: r.summary[k] for k in ("best", "loss")}, "last": r.lastHistoryStep,
    "tags": r.tags, "group": r.group, "name": r.name, "notes": r.notes, "job_type": r.job_type,
    "history": r.history(pandas=False), "sample": r.history(samples=5, keys=["loss"], pandas=False),
    "scan": list(r.scan_history()), "scan_keys": list(r.scan_history(keys=["_step", "loss"])),
    "nested": [row["d.b.c"] for row in r.scan_history(keys=["_step", "d.b.c"])],
    "group_runs": [x.id for x in api.runs("local/p", filters={"group": "g1"})],
    "no_runs": [x.id for x in api.runs("local/p", filters={"config.lr": {"$gt": 0.5}})],
    "files": sorted(f.name for f in r.files()), "host": bool(r.metadata["host"]),
    "console": [line.content for line in r.console_logs()], "entity": api.default_entity,
})(api.run("local/p/first"))"""


def test_a_run_goes_in_and_comes_out(server: Any, sdk: Any) -> None:
    """Proves the whole round trip of an SDK run: metadata, 50 rows with NaN, Infinity and nesting, files, console, queries."""
    sdk.run(TRAIN)
    got = sdk.read(READ)
    assert (got["state"], got["config"], got["last"]) == ("finished", {"lr": 0.1, "opt": {"name": "sgd"}}, 49)
    assert got["summary"] == {"best": 7, "loss": 0.02}
    assert (got["name"], got["group"], got["job_type"], got["tags"], got["notes"]) == ("First", "g1", "train", ["t"], "n")
    for read in ("history", "scan", "scan_keys"):
        rows = got[read]
        assert [row["_step"] for row in rows] == list(range(50)), read
        # Sampled history is plain JSON, where W&B's wire has the strings "NaN" and "Infinity".
        losses = [float(row["loss"]) for row in rows]
        assert math.isnan(losses[3])
        assert losses[4:7] == [math.inf, -math.inf, 1 / 7], read
    assert got["scan"][9]["d"] == {"a": 9, "b": {"c": 18}}
    assert got["nested"] == [2 * i for i in range(50)]
    assert [row["_step"] for row in got["sample"]][:1] + [row["_step"] for row in got["sample"]][-1:] == [0, 49]
    assert (got["group_runs"], got["no_runs"]) == (["first"], [])
    assert {"config.yaml", "output.log", "requirements.txt", "wandb-metadata.json", "wandb-summary.json"} <= set(got["files"])
    assert (got["host"], got["entity"]) == (True, "local")
    assert "hello from training" in got["console"]

    store = open_store(f"sqlite:///{server.data_dir / 'wbdist.db'}")
    try:
        run = store.get_run("local", "p", "first")
        assert run is not None
        rows = store.history(run.pk)
        assert [row["_step"] for row in rows] == list(range(50))
        assert math.isnan(rows[3]["loss"])
        assert rows[4]["loss"] == math.inf
        assert (run.attempt, run.state) == (0, "finished")
    finally:
        store.close()


def test_resume_must_continues(server: Any, sdk: Any) -> None:
    """Proves that resume="must" finds the run, continues its steps, keeps its config, and that a missing run is refused."""
    script = """
import wandb
run = wandb.init(project="p", id="again", resume={resume!r}, config={config})
print("STEP", run.starting_step, run.resumed)
for i in range({start}, {start} + 10):
    run.log({{"x": i}})
run.finish(exit_code={code})
"""
    assert "STEP 0 False" in sdk.run(script.format(resume=None, config={"a": 1}, start=0, code=1))
    assert sdk.read("api.run('local/p/again').state") == "failed"
    assert "STEP 10 True" in sdk.run(script.format(resume="must", config={"b": 2}, start=10, code=0))
    got = sdk.read(f"(lambda r: [r.state, r.config, {COLUMNS}])(api.run('local/p/again'))")
    assert got == ["finished", {"a": 1, "b": 2}, list(range(20)), list(range(20))]
    missing = sdk.start("import wandb; wandb.init(project='p', id='nosuch', resume='must')")
    assert missing.wait(60) != 0
    assert "nosuch" in sdk.log(missing)


def test_a_killed_process_is_a_crashed_run(server: Any, sdk: Any) -> None:
    """Proves that a run whose process was SIGKILLed is crashed after the window, and its rows are kept."""
    script = """
import time, wandb
fast = wandb.Settings(x_file_stream_transmit_interval=1, x_stats_sampling_interval=1)
run = wandb.init(project="p", id="killed", settings=fast)
run.log({"x": 1})
run.log({"x": 2})
time.sleep(60)
"""
    query = '{ project(name: "p", entityName: "local") { run(name: "killed") { state historyLineCount } } }'

    def seen() -> Any:
        project = server.graphql(query)["project"]
        return project and project["run"]

    process = sdk.start(script)
    until(lambda: (seen() or {}).get("historyLineCount"), "the first row")
    until(lambda: seen()["state"] == "running", "running")
    sdk.kill(process)
    until(lambda: seen()["state"] == "crashed", "crashed")
    assert seen()["historyLineCount"] >= 1


def test_the_servers_sudden_death_loses_and_doubles_nothing(server: Any, sdk: Any, tmp_path: Path) -> None:
    """Proves that SIGKILL to the server in the middle of an SDK run, and its return, leave every row there exactly once."""
    go_on = tmp_path / "go-on"
    script = f"""
import pathlib, time, wandb
fast = wandb.Settings(x_file_stream_transmit_interval=1, x_stats_sampling_interval=1)
run = wandb.init(project="p", id="steady", settings=fast)
for i in range(300):
    run.log({{"x": i}})
    time.sleep(0.01)
deadline = time.monotonic() + 60
while not pathlib.Path({str(go_on)!r}).exists() and time.monotonic() < deadline:
    time.sleep(0.01)
for i in range(300, 400):
    run.log({{"x": i}})
run.finish()
"""
    query = '{ project(name: "p", entityName: "local") { run(name: "steady") { state historyLineCount } } }'

    def rows() -> int:
        project = server.graphql(query)["project"]
        return int(project["run"]["historyLineCount"]) if project else 0

    process = sdk.start(script)
    before = until(lambda: rows() or 0, "the first rows")
    assert before < 300, "it must die while rows are on their way"
    server.kill()
    server.start()
    go_on.touch()
    assert process.wait(60) == 0, sdk.log(process)
    got = sdk.read(f"(lambda r: [r.state, {COLUMNS}])(api.run('local/p/steady'))")
    assert got == ["finished", list(range(400)), list(range(400))]
