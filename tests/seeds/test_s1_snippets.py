"""Seed S1, the FAQ: its snippets as they stand, by our client and by W&B's, read back by the other."""

from __future__ import annotations

import re

import pytest
from support.seeding import CLIENTS, Client, Seeds, other, snippet

by_both = pytest.mark.parametrize("client", CLIENTS)


@by_both
@pytest.mark.parametrize("name", ["s1_loop", "s1_with_loop"])
def test_runs_in_a_loop(seeds: Seeds, client: Client, name: str) -> None:
    """Proves that the loop gives ten finished runs of a hundred rows each, ended by `finish()` or by `with`."""
    project = f"{name}-{client}"
    seeds.run(client, snippet(name), seeds.place(project), WANDB_PROJECT=project)
    runs = seeds.runs(other(client), project)
    assert [run["state"] for run in runs] == ["finished"] * 10
    for x, run in enumerate(runs):
        assert [(row["_step"], row["metric"]) for row in run["rows"]] == [(y, x + y) for y in range(100)]


@pytest.mark.parametrize("method", ["fork", "thread"])
def test_start_method(seeds: Seeds, method: str) -> None:
    """Proves that the FAQ's remedy for InitStartError is taken and said to do nothing. (W&B's SDK 0.31 refuses it.)"""
    project = f"s1-{method}"
    text = "import wandb\n" + snippet(f"s1_start_method_{method}") + 'wandb.log({"a": 1})\n'
    said = seeds.run("wbdist", text, seeds.place(project), WANDB_PROJECT=project)
    assert said.count("start_method") == 1
    (run,) = seeds.runs("wandb", project)
    assert (run["state"], [row["a"] for row in run["rows"]]) == ("finished", [1])


@by_both
def test_run_name(seeds: Seeds, client: Client) -> None:
    """Proves that `run.name` is the server's at once, random words with a number that counts up within the project."""
    project = f"s1-name-{client}"
    folder = seeds.place(project)
    said = [
        seeds.run(client, snippet("s1_run_name") + 'print("NAME", run_name)\n', folder, WANDB_PROJECT=project) for _ in range(2)
    ]
    names = [re.search(r"^NAME (.*)$", text, re.MULTILINE)[1] for text in said]
    assert [run["name"] for run in seeds.runs(other(client), project)] == names
    assert [re.fullmatch(r"[a-z]+-[a-z]+-(\d+)", name)[1] for name in names] == ["1", "2"]


@by_both
def test_name_is_id(seeds: Seeds, client: Client) -> None:
    """Proves the snippet that names the run by its id. W&B's own SDK has no `save()` without arguments any more, and hangs now
    and then when a script is over milliseconds after `init`: its exit closes the connection that its `finish` waits on."""
    project = f"s1-id-{client}"
    text = snippet("s1_name_is_id")
    if client == "wandb":
        text = text.replace("wandb.run.save()\n", "wandb.finish()\n")
    seeds.run(client, text, seeds.place(project), WANDB_PROJECT=project)
    (run,) = seeds.runs(other(client), project)
    assert run["name"] == run["id"]


@by_both
def test_offline_and_sync(seeds: Seeds, client: Client) -> None:
    """Proves the offline sample and its `sync`: nothing is on the server before, all of it after, no more after a second.

    The folder has the name of the documents, `dryrun-...`, for our client; W&B's `sync` does not know it any more.
    """
    project = f"s1-offline-{client}"
    folder = seeds.place(project)
    text = snippet("s1_offline", **{"offline-demo": project})
    seeds.run(client, f'여기에_키 = "{seeds.server.key}"\n' + text, folder, WANDB_API_KEY="")
    assert seeds.read("wbdist", f"len(api.runs('local/{project}'))") == 0
    (written,) = (folder / "wandb").glob("offline-run-*")
    if client == "wbdist":
        written = written.rename(written.with_name("dryrun" + written.name.removeprefix("offline-run")))
    for _ in range(2):
        done = seeds.command(client, "sync", str(written.relative_to(folder)), folder=folder)
        assert done.returncode == 0, done.stdout
        (run,) = seeds.runs(other(client), project)
        assert [(row["_step"], row["accuracy"]) for row in run["rows"]] == [(i, i) for i in range(100)]
        assert run["config"] == {}  # the sample makes one and gives it to nobody
        assert (run["state"], run["summary"]["accuracy"]) == ("finished", 99)
        assert re.fullmatch(r"[a-z]+-[a-z]+-1", run["name"])
