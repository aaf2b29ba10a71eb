"""Seeds S3 and S4, rewind and fork: their snippets as they stand, by our client and by W&B's, read back by the other."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.seeding import CLIENTS, Client, Seeds, other, snippet

pytestmark = pytest.mark.parametrize("client", CLIENTS)


def named(name: str, project: str) -> str:
    return snippet(name, your_project_name=project, your_entity_name="local")


def expected_tail() -> list[tuple[int, dict[str, float]]]:
    """What the loops of S3 and S4 add to the rows 0..200: two rows an iteration, since neither `log` names a step."""
    rows = []
    for i in range(200, 300):
        rows.append({"metric": i if i < 250 else i + 2 * math.sin(i / 3.0)})
        rows.append({"additional_metric": i * 1.1})
    return list(enumerate(rows, start=201))


def rows_of(run: dict[str, Any], *keys: str) -> list[tuple[int, dict[str, float]]]:
    return [(row["_step"], {key: row[key] for key in keys if key in row}) for row in run["rows"]]


def test_rewind(seeds: Seeds, client: Client) -> None:
    """Proves S3's first snippet: one run with the rows 0..200 of before and 200 new ones, summary of what is left."""
    project = f"s3-rewind-{client}"
    seeds.run(client, named("s3_rewind", project), seeds.place(project))
    (run,) = seeds.runs(other(client), project)
    kept = [(i, {"metric": i}) for i in range(201)]
    assert rows_of(run, "metric", "additional_metric") == kept + expected_tail()
    assert [row["step"] for row in run["rows"][201:]] == [i for i in range(200, 300) for _ in range(2)]
    assert run["state"] == "finished"
    assert run["summary"]["metric"] == 299 + 2 * math.sin(299 / 3.0)
    assert run["summary"]["additional_metric"] == 299 * 1.1


def test_fork_from_a_rewound_run(seeds: Seeds, client: Client) -> None:
    """Proves S3's last snippet, over a run of 600 rows that was rewound to 550: the fork has 501 of its rows, and its own."""
    project = f"s3-fork-{client}"
    given = f"""import wandb
source = wandb.init(project="{project}", entity="local")
for i in range(600):
    source.log({{"metric": i}})
source.finish()
rewind_run = wandb.init(project="{project}", entity="local", resume_from=f"{{source.id}}?_step=550")
rewind_run.log({{"metric": -1}})
rewind_run.finish()
"""
    seeds.run(client, given + named("s3_fork_from_rewound", project), seeds.place(project))
    rewound, forked = seeds.runs(other(client), project)
    assert rows_of(rewound, "metric") == [(i, {"metric": i}) for i in range(551)] + [(551, {"metric": -1})]
    own = [(501 + i, {"metric": (500 + i) * 3}) for i in range(500)]
    assert rows_of(forked, "metric") == [(i, {"metric": i}) for i in range(501)] + own
    assert forked["id"] != rewound["id"]


def test_fork(seeds: Seeds, client: Client) -> None:
    """Proves S4's first snippet: a new run that shows the rows 0..200 of the first, which stays as it was."""
    project = f"s4-fork-{client}"
    text = named("s4_fork", project)
    logging = "# ... 트레이닝 또는 로깅 수행 ..."
    assert logging in text
    text = (
        text.replace(logging, "for i in range(300):\n    original_run.log({'metric': i})") + 'forked_run.log({"metric": 7})\n'
    )
    seeds.run(client, text, seeds.place(project))
    original, forked = seeds.runs(other(client), project)
    assert rows_of(original, "metric") == [(i, {"metric": i}) for i in range(300)]
    assert rows_of(forked, "metric") == [(i, {"metric": i}) for i in range(201)] + [(201, {"metric": 7})]
    assert (original["summary"]["metric"], forked["summary"]["metric"]) == (299, 7)
    assert {original["state"], forked["state"]} == {"finished"}


def test_fork_and_continue(seeds: Seeds, client: Client) -> None:
    """Proves S4's second snippet, project given by position (W&B's own SDK takes it by name only)."""
    project = f"s4-continue-{client}"
    text = named("s4_continue", project)
    if client == "wandb":
        text = text.replace(f'"{project}", entity', f'project="{project}", entity')
    seeds.run(client, text, seeds.place(project))
    original, forked = seeds.runs(other(client), project)
    assert rows_of(original, "metric", "additional_metric") == [(i, {"metric": i}) for i in range(300)]
    assert rows_of(forked, "metric", "additional_metric") == [(i, {"metric": i}) for i in range(201)] + expected_tail()
