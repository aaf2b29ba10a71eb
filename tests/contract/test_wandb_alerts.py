"""`run.alert` of W&B's own SDK and of ours, against our server."""

from __future__ import annotations

from typing import Any

import pytest

from wbdist.run.reader import Api

pytest.importorskip("wandb")


def test_alerts_of_either_client_are_kept(server: Any, sdk: Any, tmp_path: Any) -> None:
    """Proves that the unmodified SDK's alerts arrive with level and pause, and that ours do: once, with their steps, also when
    the journal is sent again."""
    script = """
import datetime, {package} as wandb
run = wandb.init(project="p", id="{id}")
run.log({{"x": 1}})
run.alert("slow", "text", level="WARN", wait_duration=300)
run.alert("slow", "dropped", wait_duration=300)
run.alert("broken", "more", level=wandb.AlertLevel.ERROR, wait_duration=datetime.timedelta(seconds=2.5))
run.finish()
"""
    sdk.run(script.format(package="wandb", id="theirs"))
    sdk.run(script.format(package="wbdist", id="ours"))
    sdk.run("from wbdist.cli import main; main(['sync', '--sync-all', '--include-synced'])")
    api = Api({"base_url": server.url}, api_key=server.key)
    for run, steps in (("theirs", [None, None]), ("ours", [1, 1])):
        found = api.run(f"local/p/{run}").alerts()
        assert [(alert.title, alert.text, alert.level, alert.step) for alert in found] == [
            ("slow", "text", "WARN", steps[0]),
            ("broken", "more", "ERROR", steps[1]),
        ]
