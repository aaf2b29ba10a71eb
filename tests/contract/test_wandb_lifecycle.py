"""Resume, rewind, fork, sync and shared runs of W&B's own SDK, unmodified, against our server; read back through its Api."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.waiting import until

from wbdist.server.store import open_store

pytest.importorskip("wandb")

HEAD = """
import os, sys, time, wandb
quick = wandb.Settings(x_file_stream_transmit_interval=1, x_stats_sampling_interval=1)
def log(run, steps, **values):
    for i in steps:
        run.log({"i": i, **{key: value(i) for key, value in values.items()}})
"""
ROWS = "[[row['_step'], row['i']] for row in api.run('local/p/{}').scan_history(keys=['_step', 'i'])]"


def rows(sdk: Any, run: str) -> Any:
    return sdk.read(ROWS.format(run))


def ask(server: Any, run: str, fields: str) -> Any:
    query = f'query($n: String!) {{ project(name: "p", entityName: "local") {{ run(name: $n) {{ {fields} }} }} }}'
    return server.graphql(query, n=run)["project"]["run"]


def test_resume_of_every_kind(server: Any, sdk: Any) -> None:
    """auto finds the id after SIGKILL and continues with config, tags, steps and runtime; allow creates and continues; must
    and never refuse without a trace. Each opening is an attempt, whose rows follow those it is built on."""
    process = sdk.start(
        HEAD
        + """
run = wandb.init(project="p", id="auto", resume="auto", config={"a": 1, "b": 1}, tags=["t"], notes="old", settings=quick)
log(run, range(50))
time.sleep(60)
"""
    )
    until(lambda: server.graphql('{ project(name: "p") { runCount } }')["project"], "the run")
    until(lambda: ask(server, "auto", "historyLineCount")["historyLineCount"] == 50, "50 rows")
    sdk.kill(process)
    said = sdk.run(
        HEAD
        + """
run = wandb.init(project="p", resume="auto", config={"b": 2})
print("RESUMED", run.id, run.resumed, run.starting_step, sorted(run.config.items()), run.tags, run.notes)
log(run, range(50, 60))
run.finish()
"""
    )
    assert "RESUMED auto True 50 [('a', 1), ('b', 2)] ('t',) old" in said
    assert rows(sdk, "auto") == [[i, i] for i in range(60)]
    found = ask(server, "auto", "state attempts { attempt baseAttempt baseStep cause rows rowsLive } lineage")
    assert found["state"] == "finished"
    assert found["attempts"] == [
        {"attempt": 0, "baseAttempt": None, "baseStep": -1, "cause": "", "rows": 50, "rowsLive": 50},
        {"attempt": 1, "baseAttempt": 0, "baseStep": 49, "cause": "resume", "rows": 10, "rowsLive": 10},
    ]
    assert found["lineage"] == [{"run": "auto", "attempt": 0, "step": 49, "kind": "resume"}]
    sdk.run(
        HEAD
        + """
for start in (0, 5):
    run = wandb.init(project="p", id="allow", resume="allow")
    assert (run.resumed, run.starting_step) == (start > 0, start)
    log(run, range(start, start + 5))
    run.finish()
for id, resume in (("nosuch", "must"), ("allow", "never")):
    try:
        wandb.init(project="p", id=id, resume=resume)
    except wandb.Error as error:
        print("REFUSED", resume, error)
    else:
        sys.exit("not refused")
"""
    )
    assert rows(sdk, "allow") == [[i, i] for i in range(10)]
    assert ask(server, "nosuch", "id") is None


@pytest.mark.slow
def test_rewind(server: Any, sdk: Any) -> None:
    """Rows to the step, inclusive, then new ones; summary (with a maximum) recomputed; config kept, merged; console new only;
    the archive whole under its immutable id; a chain of two; a fork of an archived incarnation."""
    sdk.run(
        HEAD
        + """
run = wandb.init(project="p", id="rw", config={"keep": 1, "both": 1}, settings=quick)
run.define_metric("peak", summary="max")
print("of the first")
log(run, range(30), peak=lambda i: i)
time.sleep(2.5)
run.finish()
run = wandb.init(project="p", resume_from="rw?_step=19", config={"both": 2, "new": 3}, settings=quick)
assert run.id == "rw"
run.define_metric("peak", summary="max")
print("of the second")
log(run, range(20, 25), peak=lambda i: 0, extra=lambda i: 1)
run.finish()
run = wandb.init(project="p", resume_from="rw?_step=21")
log(run, range(22, 24))
run.finish()
run = wandb.init(project="p", id="fk", fork_from="rw:0?_step=25", config={"new": 9})
log(run, range(26, 28))
run.finish()
"""
    )
    expected = [[i, i] for i in range(24)]
    assert rows(sdk, "rw") == expected
    assert rows(sdk, "rw:0") == [[i, i] for i in range(30)]
    assert rows(sdk, "rw:1") == [[i, i] for i in range(25)]
    assert rows(sdk, "fk") == [[i, i] for i in range(28)]
    read = """(lambda r: [r.summary_metrics.get("peak"), r.summary["i"], r.config, r.state,
        [line.content for line in r.console_logs() if "of the" in line.content]])(api.run('local/p/{}'))"""
    now, old, middle, fork = (sdk.read(read.format(name)) for name in ("rw", "rw:0", "rw:1", "fk"))
    assert now[:4] == [{"max": 19}, 23, {"keep": 1, "both": 2, "new": 3}, "finished"]
    assert old[:4] == [{"max": 29}, 29, {"keep": 1, "both": 1}, "finished"]
    assert middle[:3] == [{"max": 19}, 24, {"keep": 1, "both": 2, "new": 3}]
    assert fork[1:3] == [27, {"keep": 1, "both": 1, "new": 9}]
    assert (now[4], old[4], middle[4], fork[4]) == ([], ["of the first"], ["of the second"], [])
    chain = [
        (entry["run"], entry["attempt"], entry["step"], entry["kind"]) for entry in ask(server, "rw", "lineage")["lineage"]
    ]
    assert chain == [("rw", 1, 21, "rewind"), ("rw", 0, 19, "rewind")]
    assert ask(server, "fk", "lineage")["lineage"] == [{"run": "rw", "attempt": 0, "step": 25, "kind": "fork"}]


@pytest.mark.slow
def test_fork(server: Any, sdk: Any) -> None:
    """Of a running source, which goes on untouched, and of a fork; config inherited and merged; new metrics."""
    source = sdk.start(
        HEAD
        + """
run = wandb.init(project="p", id="src", config={"lr": 1, "seed": 5}, settings=quick)
log(run, range(30))
open("logged", "w").close()
while not os.path.exists("forked"): time.sleep(0.1)
log(run, range(30, 40))
run.finish()
"""
    )
    folder = Path(sdk._folder)
    until((folder / "logged").exists, "the source's rows")
    until(lambda: (ask(server, "src", "historyLineCount") or {}).get("historyLineCount") == 30, "30 rows")
    sdk.run(
        HEAD
        + """
run = wandb.init(project="p", id="f1", fork_from="src?_step=20", config={"lr": 2})
log(run, range(21, 25), more=lambda i: i)
run.finish()
run = wandb.init(project="p", id="f2", fork_from="f1?_step=22")
log(run, range(23, 26))
run.finish()
open("forked", "w").close()
"""
    )
    assert source.wait(60) == 0, sdk.log(source)
    assert rows(sdk, "src") == [[i, i] for i in range(40)]
    assert rows(sdk, "f1") == [[i, i] for i in range(25)]
    assert rows(sdk, "f2") == [[i, i] for i in range(26)]
    more = "[row['more'] for row in api.run('local/p/f1').scan_history(keys=['more'])]"
    assert sdk.read(more) == [21, 22, 23, 24]
    assert sdk.read("api.run('local/p/f1').config") == {"lr": 2, "seed": 5}
    assert sdk.read("[api.run('local/p/f1').summary.get(k) for k in ('i', 'more')]") == [24, 24]
    assert sdk.read("api.run('local/p/f1').rawconfig['_wandb']['branch_point']") == {"run_id": "src", "step": 20}


def test_refusals_change_nothing(server: Any, sdk: Any) -> None:
    """A step beyond the end, an unknown source, an unknown run: a clear error, no new run, the old one as it was."""
    said = sdk.run(
        HEAD
        + """
run = wandb.init(project="p", id="r")
log(run, range(5))
run.finish()
for how in ({"resume_from": "r?_step=5"}, {"fork_from": "r?_step=7", "id": "a"}, {"fork_from": "nosuch?_step=1", "id": "b"},
            {"resume_from": "nosuch?_step=1"}):
    try:
        wandb.init(project="p", **how)
    except wandb.Error as error:
        print("REFUSED", how, error)
    else:
        sys.exit(f"{how} was not refused")
"""
    )
    assert "run r has no step 5: its steps end at 4" in said
    assert "run r has no step 7: its steps end at 4" in said
    assert said.count("run local/p/nosuch does not exist") == 2
    assert rows(sdk, "r") == [[i, i] for i in range(5)]
    assert ask(server, "r", "attempts { attempt }")["attempts"] == []
    assert [run["name"] for run in _runs(server)] == ["r"]


def _runs(server: Any) -> Any:
    found = server.graphql('{ project(name: "p") { runs { edges { node { name } } } } }')["project"]["runs"]["edges"]
    return [edge["node"] for edge in found]


def test_the_same_id_again_without_resume(server: Any, sdk: Any) -> None:
    """The new rows are the run; the old ones are in the archive, not between them."""
    sdk.run(
        HEAD
        + """
for sign in (1, -1):
    run = wandb.init(project="p", id="again", config={f"of{sign}": sign})
    for i in range(10 - (sign < 0) * 4):
        run.log({"i": i * sign})
    run.finish()
"""
    )
    assert rows(sdk, "again") == [[i, -i] for i in range(6)]
    assert rows(sdk, "again:0") == [[i, i] for i in range(10)]
    assert sdk.read("[api.run(f'local/p/again{x}').config for x in ('', ':0')]") == [{"of-1": -1}, {"of1": 1}]


OFFLINE = (
    HEAD
    + """
quick = None
os.environ["WANDB_MODE"] = "offline"
def offline(start, count, **how):
    run = wandb.init(project="p", **how)
    print(f"printed from {start}")
    log(run, range(start, start + count))
    run.finish()
    time.sleep(1.1)  # the directory's name has a second's precision
offline(0, 10, id="off")
offline(10, 5, id="off", resume="allow")
offline(0, 8, id="src")
offline(5, 3, id="fork", fork_from="src?_step=4")
offline(7, 3, resume_from="src?_step=6")
import glob, subprocess
def sync():
    for path in sorted(glob.glob("wandb/offline-run-*"), key=os.path.getmtime):
        subprocess.run([sys.executable, "-m", "wandb", "sync", "--include-synced", path], check=True)
"""
)


@pytest.mark.slow
def test_sync_once_and_twice(server: Any, sdk: Any) -> None:
    """An offline run, its resumed segment, a fork and a rewind of another: the same after one sync and after two."""
    expected = {
        "off": [[i, i] for i in range(15)],
        "src": [[i, i] for i in range(10)],
        "fork": [[i, i] for i in range(8)],
    }
    histories = "{" + ", ".join(f"{run!r}: {ROWS.format(run)}" for run in expected) + "}"
    console = "[line.content for line in api.run('local/p/off').console_logs() if 'printed' in line.content]"
    sdk.run(OFFLINE + "sync()", timeout=120)
    once = sdk.read(f"[{histories}, {console}]")
    assert once == [expected, ["printed from 0", "printed from 10"]]
    sdk.run(OFFLINE.partition("offline(0, 10")[0] + OFFLINE[OFFLINE.index("import glob") :] + "sync()", timeout=120)
    assert sdk.read(f"[{histories}, {console}]") == once


def test_shared_mode(server: Any, sdk: Any) -> None:
    """Three processes open one run at once, each with its own steps and offsets from 0: every row is there once, under the step
    its writer gave it (the SDK drops explicit ones in this mode); configs merge, one end ends it, no attempt is begun."""
    writer = (
        HEAD
        + """
n = N
shared = wandb.Settings(mode="shared", x_primary=n == 0, x_label=f"rank{n}", x_update_finish_state=n == 0,
                        x_file_stream_transmit_interval=1)
run = wandb.init(project="p", id="sh", settings=shared, config={f"from{n}": n})
for i in range(n, 60, 3):
    run.log({"i": i, f"only{n}": i},)
print(f"printed by {n}")
if n == 0:
    while not (os.path.exists("done1") and os.path.exists("done2")): time.sleep(0.1)
run.finish()
open(f"done{n}", "w").close()
"""
    )
    processes = [sdk.start(f"N = {n}{writer}") for n in range(3)]
    for process in processes:
        assert process.wait(90) == 0, sdk.log(process)
    found = rows(sdk, "sh")
    assert [step for step, _ in found] == sorted(step for step, _ in found)
    assert sorted(found) == sorted([row, n + 3 * row] for n in range(3) for row in range(20))
    got = sdk.read(
        """(lambda r: [r.config, r.state, sorted(line.content for line in r.console_logs() if "printed by" in line.content)])
        (api.run('local/p/sh'))"""
    )
    assert got[:2] == [{"from0": 0, "from1": 1, "from2": 2}, "finished"]
    assert got[2] == ["printed by 0", "printed by 1", "printed by 2"]
    store = open_store(f"sqlite:///{server.data_dir / 'wbdist.db'}")
    try:
        run = store.get_run("local", "p", "sh")
        assert run is not None
        assert run.attempt == 0
    finally:
        store.close()


def test_runs_are_changed_through_the_api(server: Any, sdk: Any) -> None:
    """Config, tags, notes, name and summary are edited; a running run is stopped; states are set; a deleted id is refused."""
    victim = sdk.start(
        HEAD
        + """
from wandb.sdk.lib.run_stopping import RunStopChecker
RunStopChecker.__init__.__kwdefaults__["poll_interval"] = 0.5  # 15 s
run = wandb.init(project="p", id="victim", config={"a": 1}, settings=quick)
log(run, range(3))
while True:
    time.sleep(0.1)
"""
    )
    said = sdk.run(
        HEAD
        + """
deadline = time.monotonic() + 30
while True:
    try:
        run = wandb.Api().run("local/p/victim")  # an Api keeps runs as it first saw them
        # The summary may come a request after the rows.
        if run.state == "running" and run.lastHistoryStep == 2 and run.summary.get("i") == 2: break
    except (ValueError, wandb.Error, TypeError): pass
    assert time.monotonic() < deadline
    time.sleep(0.2)
run.config["b"] = 2
run.tags.append("t")
run.notes, run.display_name = "n", "named"
run.summary["best"] = 7
run.update()
again = wandb.Api().run("local/p/victim")
print("EDITED", sorted(again.config.items()), again.tags, again.notes, again.name, again.summary["best"], again.summary["i"])
run.stop()
"""
    )
    assert "EDITED [('a', 1), ('b', 2)] ['t'] n named 7 2" in said
    assert victim.wait(60) != 0
    said = sdk.run(
        HEAD
        + """
api = wandb.Api()
print("STATE", api.run("local/p/victim").state)
made = api.create_run(run_id="made", project="p")
made.update_state("failed")
made.update_state("pending")
print("MADE", wandb.Api().run("local/p/made").state)
api.run("local/p/victim").delete()
print("LEFT", [run.id for run in api.runs("local/p")])
try:
    wandb.init(project="p", id="victim")
except wandb.Error as error:
    print("REFUSED", error)
"""
    )
    assert "STATE killed" in said
    assert "MADE pending" in said
    assert "LEFT ['made']" in said
    assert "REFUSED run local/p/victim was previously created and deleted" in said
