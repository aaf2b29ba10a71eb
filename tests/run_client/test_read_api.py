"""`Api`: runs and projects read and changed, with the same names and the same answers as W&B's."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import requests
from support.seeding import Seeds

import wbdist
from wbdist.errors import DeadlineError
from wbdist.run.reader import ProjectNotFoundError, RunNotFoundError
from wbdist.run.remote_run import RunRecord

WRITE = """
import sys
import wandb
for i in range(3):
    with wandb.init(project="read", id=f"run{i}", name=f"Run {i}", group="g", job_type="j", tags=["t"], notes="n",
                    config={"lr": 0.1 * i, "net": {"width": 3}}) as run:
        for step in range(10):
            run.log({"loss": 1 / (step + 1), "even": step} if step % 2 == 0 else {"loss": 1 / (step + 1)})
        print("a line of run", i)
        print("an error", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeds]:
    """A server with a project `read` of three runs, which W&B's client logged."""
    with Seeds(tmp_path_factory.mktemp("read")) as world:
        world.run("wandb", WRITE, world.place("writer"))
        yield world


@pytest.fixture
def api(world: Seeds, monkeypatch: pytest.MonkeyPatch) -> wbdist.Api:
    monkeypatch.setenv("WANDB_BASE_URL", world.server.url)
    monkeypatch.setenv("WANDB_API_KEY", world.server.key)
    return wbdist.Api()


ATTRIBUTES = """(lambda r: {
    "id": r.id, "name": r.name, "display_name": r.display_name, "state": r.state, "config": r.config,
    "entity": r.entity, "project": r.project, "group": r.group, "job_type": r.job_type, "tags": r.tags, "notes": r.notes,
    "created_at": r.created_at, "heartbeat_at": r.heartbeat_at, "storage_id": r.storage_id, "path": r.path, "url": r.url,
    "user": [r.user.username, r.user.name], "sweep": r.sweep, "sweep_name": r.sweep_name, "commit": r.commit or "",
    "last": r.lastHistoryStep, "rawconfig": sorted(r.rawconfig),
    "summary": {k: r.summary[k] for k in ("loss", "even", "_step")}, "metrics": r.summary_metrics["loss"],
    "history": r.history(pandas=False), "keyed": r.history(keys=["even"], pandas=False),
    "few": len(r.history(samples=3, pandas=False)),
    "scan": list(r.scan_history()), "scan_keys": [
        [row["loss"], row["even"]] for row in r.scan_history(keys=["loss", "even"], page_size=3)],
    "scan_range": list(r.scan_history(keys=["_step"], min_step=2, max_step=5)),
    "system": isinstance(r.system_metrics, dict), "lines": [[l.number, l.level, l.content] for l in r.console_logs()],
    "last_lines": [l.content for l in r.console_logs(last=1)],
})(api.run("local/read/run1"))"""

PROJECT = """{
    "projects": [[p.entity, p.name, p.created_at, p.path] for p in api.projects("local")],
    "project": [api.project("read", "local").name, api.from_path("local/read").entity, api.from_path("local/read/run1").id],
    "entity": api.default_entity, "viewer": [api.viewer.username, api.viewer.entity],
    "length": len(api.runs("local/read", per_page=2)), "index": api.runs("local/read", per_page=1)[2].id,
    "slice": [r.id for r in api.runs("local/read")[0:2]],
    "order": [r.id for r in api.runs("local/read", order="-config.lr.value")],
    "filter": [r.id for r in api.runs("local/read", filters={"$or": [
        {"config.lr": {"$gt": 0.15}}, {"display_name": "Run 0"}]})],
    "histories": api.runs("local/read").histories(keys=["even"]),
}"""


@pytest.mark.parametrize("expression", [ATTRIBUTES, PROJECT], ids=["run", "project"])
def test_answers_are_those_of_wandbs_own_api(world: Seeds, expression: str) -> None:
    """Proves name by name that our read API answers what W&B's answers about the same server."""
    ours, theirs = world.read("wbdist", expression), world.read("wandb", expression)
    for name, value in theirs.items():
        assert ours[name] == value, name


def test_history_is_a_data_frame(world: Seeds, api: wbdist.Api) -> None:
    """Proves that with pandas installed history is the same frame that W&B's client gives, by steps and by keys."""
    run = api.run("local/read/run1")
    for arguments in ("", "keys=['even']", "samples=3", "stream='system'"):
        ours = eval(f"run.history({arguments})", {"run": run})
        theirs = world.read("wandb", f"api.run('local/read/run1').history({arguments}).to_json()")
        assert isinstance(ours, pandas.DataFrame)
        assert json.loads(ours.to_json()) == json.loads(theirs), arguments


def test_every_form_of_a_path(api: wbdist.Api) -> None:
    """Proves that a run is found by each way of writing it, and that what is missing is a ValueError too, as W&B's is."""
    url = api.run("local/read/run1").url
    forms = ("local/read/run1", "read/run1", "local/read:run1", "read:run1", "local/read/runs/run1", "/local/read/runs/run1/")
    for path in (*forms, url, url + "/overview?nw=x"):
        assert api.run(path).id == "run1", path
    assert wbdist.Api({"project": "read"}).run("run2").id == "run2"
    api.create_run(project="numbered", run_id="7")
    assert api.run("local/numbered:7").id == "7"
    for path in ("local/read/nope", "local/nope/run1", "nobody/read/run1"):
        with pytest.raises(ValueError, match="could not find run"):
            api.run(path)
    with pytest.raises(wbdist.UsageError, match="entity/project/id"):
        api.run("a/b/c/d/e/f")
    with pytest.raises(ProjectNotFoundError, match="local/nope"):
        api.project("nope")


def test_changes_are_written(world: Seeds, api: wbdist.Api) -> None:
    """Proves that what is set on a run and written with `update()` is what W&B's client reads, and nothing else changed."""
    run = api.create_run(project="edited", run_id="one")
    assert (run.state, run.lastHistoryStep, run.history(pandas=False)) == ("running", -1, [])
    run.config.update({"lr": 0.5, "gone": 1})
    run.update()
    del run.config["gone"]
    run.name, run.notes, run.tags, run.group, run.job_type = "One", "why", ["a", "b"], "g", "j"
    run.update()
    run.summary.update({"best": 7})
    run.summary["later"] = 8
    assert "later" not in api.run("edited/one").summary
    run.save()
    expression = "[r.name, r.notes, r.tags, r.group, r.job_type, r.config, r.summary['best'], r.summary['later'], r.state]"
    got = world.read("wandb", f"(lambda r: {expression})(api.run('local/edited/one'))")
    assert got == ["One", "why", ["a", "b"], "g", "j", {"lr": 0.5}, 7, 8, "running"]
    run.name = "forgotten"
    assert run.load(force=True).name == "One"


def test_states_and_deletion(world: Seeds, api: wbdist.Api) -> None:
    """Proves that a run is requeued, given up and deleted as through W&B's Api, and what is refused."""
    run = api.create_run(project="ended", run_id="one")
    kept = api.create_run(project="ended", run_id="two", state="pending")
    assert run.update_state("pending")
    assert run.state == "pending"
    assert run.update_state("failed")
    assert world.read("wandb", "[r.state for r in api.runs('local/ended')]") == ["failed", "pending"]
    with pytest.raises(wbdist.UsageError, match="pending, failed"):
        run.update_state("finished")
    with pytest.raises(wbdist.UsageError, match="delete_artifacts"):
        run.delete(delete_artifacts=True)
    run.delete()
    assert [found.id for found in api.runs("ended")] == [kept.id]
    with pytest.raises(RunNotFoundError):
        run.load()
    with pytest.raises(wbdist.CommError, match="deleted"):
        api.create_run(project="ended", run_id="one")


def test_stop_reaches_the_process(world: Seeds, api: wbdist.Api) -> None:
    """Proves that after `stop()` the run's next beat is answered with `stopped`, which W&B's client turns into an interrupt."""
    run = api.create_run(project="stopped", run_id="one")
    address = f"{world.server.url}/files/local/stopped/one/file_stream"
    for expected in (False, True):
        answer = requests.post(address, json={"files": {}}, auth=("api", world.server.key), timeout=10)
        assert (answer.status_code, answer.json().get("stopped", False)) == (200, expected)
        run.stop()


def test_waiting_for_the_end(world: Seeds, api: wbdist.Api, tmp_path: Path) -> None:
    """Proves that `wait_until_finished` returns once another process has ended the run, and gives up when told to."""
    with pytest.raises(DeadlineError, match="still running"):
        api.create_run(project="waited", run_id="never").wait_until_finished(timeout=0)
    run = wbdist.init(project="waited", dir=tmp_path, settings={"silent": True})
    ending = threading.Timer(0.2, run.finish)
    ending.start()
    found = wbdist.Api().run(run.path)
    found.wait_until_finished(timeout=60)
    assert found.state == "finished"
    ending.join()


def test_every_name_of_wandbs_is_real_or_refused(world: Seeds, api: wbdist.Api, tmp_path: Path) -> None:
    """Proves that no method or property of W&B's read API and artifacts is silently nothing."""
    (tmp_path / "a.txt").write_text("a")
    made = wbdist.Artifact("named", type="t")
    made.add_file(tmp_path / "a.txt")
    with wbdist.init(project="names", dir=tmp_path, settings={"silent": True}) as run:
        run.log_artifact(made)
    remote = api.run(run.path)
    objects = {
        "Api": api,
        "apis.public.Run": remote,
        "apis.public.File": remote.files()[0],
        "apis.public.Runs": api.runs("names"),
        "Artifact": api.artifact("names/named:latest"),
        "sdk.wandb_run.Run": run,
        "sdk.artifacts.artifact.Artifact": made,
    }
    inner = {
        "snake_to_camel", "user_agent", "convert_objects", "cursor", "last_response", "more", "next", "update_variables",
        "upgrade_to_full",
    }  # fmt: skip
    for theirs, ours in objects.items():
        names = world.read("wandb", f"[name for name in dir(wandb.{theirs}) if not name.startswith('_')]")
        assert len(names) > 3
        said = {name: _refusal(ours, name) for name in names}
        unknown = [name for name, error in said.items() if error is not None and not isinstance(error, wbdist.UsageError)]
        assert set(unknown) <= inner, theirs
    assert remote.metadata is not None
    assert remote.metadata["program"]


def test_every_argument_of_wandbs_is_taken(world: Seeds, api: wbdist.Api) -> None:
    """Proves that functions and methods have all of W&B's arguments, by name."""
    del api
    run = ("log", "save", "restore", "define_metric", "watch", "unwatch", "alert", "finish", "log_artifact", "use_artifact")
    run += ("log_model", "use_model", "link_model", "log_code", "mark_preempting")
    read = (
        "history",
        "scan_history",
        "files",
        "file",
        "upload_file",
        "delete",
        "update",
        "wait_until_finished",
        "console_logs",
    )
    asked = {
        **{
            name: getattr(wbdist, name)
            for name in ("init", "login", "setup", "teardown", "finish", "restore", "Api", "Histogram")
        },
        **{f"sdk.wandb_run.Run.{name}": getattr(wbdist.Run, name) for name in run},
        **{f"apis.public.Run.{name}": getattr(RunRecord, name) for name in read},
        **{
            f"Api.{name}": getattr(wbdist.Api, name)
            for name in ("run", "runs", "project", "projects", "artifact", "create_run")
        },
    }
    signatures = "{name: list(__import__('inspect').signature(eval('wandb.' + name)).parameters) for name in %r}"
    theirs = world.read("wandb", signatures % list(asked))
    missing = {name: sorted(set(theirs[name]) - set(inspect.signature(ours).parameters)) for name, ours in asked.items()}
    assert {name: names for name, names in missing.items() if names} == {}


def _refusal(ours: object, name: str) -> AttributeError | None:
    try:
        getattr(ours, name)
    except AttributeError as error:
        return error
    except ValueError:
        return None
    return None


def test_names_that_are_not_here_say_so(api: wbdist.Api) -> None:
    """Proves that W&B's further names are refused by name, and misspelt ones are plain attribute errors."""
    for name in ("sweep", "reports", "create_project"):
        with pytest.raises(wbdist.UsageError, match=f"no `{name}`"):
            getattr(api, name)
    run = api.run("read/run0")
    with pytest.raises(wbdist.UsageError, match=r"no `beta_scan_history`: .*scan_history"):
        run.beta_scan_history()
    assert not hasattr(run, "stat")
    assert not hasattr(api, "runz")
    assert issubclass(RunNotFoundError, wbdist.CommError)
    with pytest.raises(wbdist.UsageError, match="per_page"):
        api.runs("read", per_page=0)
    with pytest.raises(wbdist.UsageError, match="samples"):
        run.history(samples=0)


def test_steps_that_lie_far_apart_are_read_in_few_pages(world: Seeds, api: wbdist.Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a history whose steps count tokens is read whole, dense stretches included, with requests in the order of its
    rows: a page a thousand steps would take a million of them. An archived attempt's, whose end nobody tells, too."""
    steps = [*range(10**9, 10**9 + 2500), *range(2 * 10**9, 10**12, 10**9 * 7), 10**12]
    script = f"run = wandb.init(project='read', id='far')\nfor step in {steps}: run.log({{'a': step}}, step=step)\nrun.finish()"
    world.run("wbdist", f"import wandb\n{script}", world.place("far"))
    asked: list[str] = []
    execute = api.execute
    monkeypatch.setattr(api, "execute", lambda operation: asked.append(operation.name) or execute(operation))
    run = api.run("read/far")
    assert [row["a"] for row in run.scan_history()] == steps
    assert [row["a"] for row in run.scan_history(attempt=1)] == steps
    assert [row["a"] for row in run.scan_history(min_step=10**9 + 2499, max_step=10**12)] == steps[2499:-1]
    assert len(asked) < 500, len(asked)
