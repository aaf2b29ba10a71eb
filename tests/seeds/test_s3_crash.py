"""Acceptance of seed S3's hardest row: the server is killed while it rewinds."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import requests
from support.seeding import Seeds

import wbdist as wandb
from wbdist.protocol import operations
from wbdist.protocol.attempts import BeginAttempt


def rows(project: str) -> list[int]:
    return [row["i"] for row in wandb.Api().run(f"{project}/src").scan_history()]


@pytest.mark.usefixtures("here")
def test_a_server_killed_while_it_rewinds(seeds: Seeds, here: Path, project: str) -> None:
    """Proves that a run whose rewind met the server's SIGKILL shows all rows or those up to the step, never anything between,
    and that asking again ends in the latter."""
    with wandb.init(id="src") as run:
        for i in range(2000):
            run.log({"i": i})
    expected = list(range(2000))
    for attempt, delay in enumerate((0.0, 0.002, 0.004, 0.008), start=2):
        step = 2000 - 100 * attempt
        request = BeginAttempt(attempt, f"nonce{attempt}", "w", at_step=step, fresh=("console", "events"), cause="rewind")
        body = operations.begin_attempt("local", project, "src", request).body()

        def ask(body: bytes = body) -> bool:
            try:
                answer = requests.post(f"{seeds.server.url}/graphql", data=body, auth=("api", seeds.server.key), timeout=10)
            except requests.RequestException:
                return False
            return bool(answer.ok and answer.json()["data"]["beginAttempt"]["accepted"])

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(delay)
        seeds.server.kill()
        asking.join()
        seeds.server.start()
        kept = list(range(step + 1))
        assert rows(project) in (expected, kept)
        assert ask()
        assert rows(project) == kept
        assert [one["_step"] for one in wandb.Api().run(f"{project}/src").scan_history(attempt=1)] == list(range(2000))
        expected = kept
