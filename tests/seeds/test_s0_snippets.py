"""Seed S0, several runs in one process: its snippets as they stand, by our client and by W&B's, read back by the other."""

from __future__ import annotations

import pytest
from support.seeding import CLIENTS, Client, Seeds, other, snippet

BEFORE = 'import wandb\nfirst = wandb.init()\nfirst.log({"of": "first"})\n'
AFTER = '\nlast = wandb.init()\nlast.log({"of": "last"})\nlast.finish()\nwandb.finish()\nprint("SAME", last is first)\n'
"""What the snippets of `reinit` stand between: a run that is open already, and one that is opened after them."""

STATES = {"create_new": 2, "finish_previous": 2, "return_previous": 1}
"""reinit -> runs there are after two inits"""

by_both = pytest.mark.parametrize("client", CLIENTS)
by_both_for_each_value = pytest.mark.parametrize(
    ("client", "value"),
    [*((client, "create_new") for client in CLIENTS), ("wbdist", "finish_previous"), ("wbdist", "return_previous")],
)
"""Each snippet by both clients; what the values mean is ours to keep, so W&B's client shows one of them."""


@by_both_for_each_value
@pytest.mark.parametrize("name", ["s0_reinit_argument", "s0_reinit_settings"])
def test_reinit_given_to_init(seeds: Seeds, client: Client, name: str, value: str) -> None:
    """Proves that `reinit` as an argument and in `Settings` decides what becomes of the run that is open."""
    project = f"{name}-{value}-{client}"
    text = snippet(name, **{"<create_new|finish_previous|return_previous>": value})
    said = seeds.run(client, f"{BEFORE}{text}print('OPEN', wandb.run is first)\n", seeds.place(project), WANDB_PROJECT=project)
    runs = seeds.runs(other(client), project)
    assert [run["state"] for run in runs] == ["finished"] * STATES[value]
    assert [row["of"] for row in runs[0]["rows"]] == ["first"]
    assert f"OPEN {value != 'finish_previous'}" in said


@by_both_for_each_value
@pytest.mark.parametrize("how", ["setup", "environment"])
def test_reinit_for_the_whole_process(seeds: Seeds, client: Client, how: str, value: str) -> None:
    """Proves that `setup()` and WANDB_REINIT hold for every later init, and that an init's own argument goes first."""
    project = f"s0-{how}-{value}-{client}"
    placeholder = {"<create_new|finish_previous|return_previous>": value}
    text = snippet("s0_reinit_setup", **placeholder) if how == "setup" else "import wandb\n"
    environment = {"WANDB_REINIT": value} if how == "environment" else {}
    text += BEFORE.removeprefix("import wandb\n") + AFTER
    text += 'argument = wandb.init(reinit="create_new")\nargument.finish()\n'
    said = seeds.run(client, text, seeds.place(project), WANDB_PROJECT=project, **environment)
    runs = seeds.runs(other(client), project)
    assert [run["state"] for run in runs] == ["finished"] * (STATES[value] + 1)
    rows = [row["of"] for run in runs for row in run["rows"]]
    assert rows == ["first", "last"]
    assert f"SAME {value == 'return_previous'}" in said


@by_both
def test_parent_and_child(seeds: Seeds, client: Client) -> None:
    """Proves the nested `with` under `setup(reinit="create_new")`: two runs, and the parent has the child's result."""
    project = f"s0-parent-{client}"
    given = 'def do_experiment(run):\n    run.log({"detail": 1})\n    return {"result": 7}\n'
    seeds.run(client, given + snippet("s0_parent_and_child"), seeds.place(project), WANDB_PROJECT=project)
    parent, child = seeds.runs(other(client), project)
    assert [(row["_step"], row["result"]) for row in parent["rows"]] == [(0, 7)]
    assert [(row["_step"], row["detail"]) for row in child["rows"]] == [(0, 1)]
    assert {parent["state"], child["state"]} == {"finished"}


@by_both
def test_tracking_run(seeds: Seeds, client: Client) -> None:
    """Proves the workflow of one long run and short ones beside it: three runs, each with its own rows only."""
    project = f"s0-tracking-{client}"
    seeds.run(client, snippet("s0_tracking_run", my_project=project), seeds.place(project))
    found = {run["name"]: run for run in seeds.runs(other(client), project)}
    assert list(found) == ["tracking_run", "training_1", "training_2"]
    assert {run["state"] for run in found.values()} == {"finished"}
    tracked = [(row["_step"], row["eval_loss"], row["eval_accuracy"]) for row in found["tracking_run"]["rows"]]
    assert tracked == [(0, 0.27, 0.91), (1, 0.27, 0.91)]
    for name in ("training_1", "training_2"):
        assert [(row["_step"], row["train_loss"]) for row in found[name]["rows"]] == [(0, 0.42)]
        assert "eval_loss" not in found[name]["summary"]
