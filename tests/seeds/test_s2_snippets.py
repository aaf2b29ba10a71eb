"""Seed S2, resume: its snippets as they stand, by our client and by W&B's, read back by the other."""

from __future__ import annotations

import pytest
from support.seeding import CLIENTS, Client, Seeds, other, snippet

pytestmark = pytest.mark.parametrize("client", CLIENTS)


def test_ids_that_resume(seeds: Seeds, client: Client) -> None:
    """Proves the snippet of controlled resuming: an id kept for later by argument, and another by the environment.

    W&B's SDK 0.31 has no `wandb.util.generate_id` any more, and reads the environment once, so each half runs by itself.
    """
    project = f"s2-ids-{client}"
    folder = seeds.place(project)
    first, second = snippet("s2_generate_id").split("# 또는 환경 변수를 통해\n")
    first, second = "import wandb\n" + first, "import os\nimport wandb\n" + second
    if client == "wandb":
        first, second = (text.replace("wandb.util.generate_id", "wandb.sdk.lib.runid.generate_id") for text in (first, second))
    log = 'wandb.log({"x": wandb.run.step})\nprint("ID", wandb.run.id, wandb.run.resumed)\n'
    said = seeds.run(client, first + log, folder, WANDB_PROJECT=project)
    run_id = said.split("ID ")[1].split()[0]
    assert f"ID {run_id} False" in said
    again = f'import wandb\nid = "{run_id}"\nwandb.init(id=id, resume="allow")\n'
    assert f"ID {run_id} True" in seeds.run(client, again + log, folder, WANDB_PROJECT=project)
    said = seeds.run(client, second + log, folder, WANDB_PROJECT=project)
    by_environment = said.split("ID ")[1].split()[0]
    again = {"WANDB_RESUME": "must", "WANDB_RUN_ID": by_environment}
    said = seeds.run(client, "import wandb\nwandb.init()\n" + log, folder, WANDB_PROJECT=project, **again)
    assert f"ID {by_environment} True" in said
    runs = seeds.runs(other(client), project)
    assert [run["id"] for run in runs] == [run_id, by_environment]
    for run in runs:
        assert [row["_step"] for row in run["rows"]] == [0, 1]
