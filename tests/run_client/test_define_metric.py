"""`define_metric` as users call it: arguments, what the summary and the rows become, and what another attempt goes on with."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

import wbdist
from wbdist.protocol import jsonvalues
from wbdist.run.init import make_spec
from wbdist.run.journal import JournalReader
from wbdist.run.lifecycle import open_run
from wbdist.run.shipper.lines import Translator
from wbdist.settings import resolve

pytestmark = pytest.mark.usefixtures("offline")


def shipped(run: wbdist.Run) -> Translator:
    assert run.journal_path is not None
    with JournalReader.open(run.journal_path) as reader:
        translator = Translator(reader.header)
        while records := reader.read():
            translator.feed(records)
    return translator


def history(run: wbdist.Run) -> list[dict[str, Any]]:
    rows = [jsonvalues.loads(line) for line in shipped(run).lines["wandb-history.jsonl"]]
    return [{key: value for key, value in row.items() if key not in {"_timestamp", "_runtime"}} for row in rows]


def test_summary_step_metric_and_config() -> None:
    """Proves the summary in the process and in what is shipped, rows completed with their step metric, and the config."""
    run = wbdist.init(project="p", settings={"quiet": True})
    made = run.define_metric("loss", step_metric="epoch", summary="min, max,mean,last,first,best", goal="maximize")
    assert (made.name, made.step_metric, made.step_sync, made.goal) == ("loss", "epoch", True, "max")
    wbdist.define_metric("val/*", step_metric=run.define_metric("epoch"), hidden=True)
    run.define_metric("dot\\.ted", summary="none")
    run.log({"epoch": 1})
    for value in (3.0, 1.0, math.nan, 2.0):
        run.log({"loss": value})
    run.log({"val/a": 7, "dot.ted": 1, "epoch": 2})
    run.log({"nested": {"x": 1}, "val/a": 8})
    run.log({"loss": 100.0}, commit=False)
    want = {"min": 1.0, "max": 3.0, "mean": 2.0, "best": 3.0, "last": 2.0, "first": 3.0}
    assert dict(run.summary["loss"]) == want
    assert run.summary["val/a"] == 8
    assert "dot.ted" not in run.summary
    assert "_wandb" not in run.summary.keys()  # noqa: SIM118
    assert run.position().summary["_wandb"] == {"sums": {"loss": [3, 6.0]}}
    run.finish()
    assert run.summary["loss"]["max"] == 100.0
    assert [(row["_step"], row.get("epoch")) for row in history(run)] == [
        (0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2),
    ]  # fmt: skip
    assert shipped(run).wandb_config()["_wandb"]["value"]["m"] == [
        {"1": "loss", "5": 2, "6": [1, 3], "7": [1, 2, 3, 4, 5, 8], "8": 2},
        {"1": "epoch", "6": [3], "7": []},
        {"1": "dot\\.ted", "6": [3], "7": [6]},
        {"2": "val/*", "5": 2, "6": [1, 2, 3], "7": []},
    ]


def test_another_attempt_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that an attempt which starts from a position, with the definitions from the config, continues every aggregate and
    knows the step metric's last value, also one that the summary does not show."""
    spec = make_spec(resolve(None, {"mode": "offline", "quiet": True, "project": "p"}))
    first = open_run(spec)
    first.define_metric("loss", step_metric="epoch", summary="min,max,mean")
    first.define_metric("epoch", summary="none")
    for epoch in range(3):
        first.log({"loss": float(epoch), "epoch": epoch})
    position = first.position()
    metrics = tuple(shipped(first).wandb_config()["_wandb"]["value"]["m"])
    first.log({"loss": 1000.0})
    first.finish()

    second = open_run(msgspec.structs.replace(spec, run_id=first.id, attempt=2, base=position, metrics=metrics))
    assert second.summary["loss"] == {"min": 0.0, "max": 2.0, "mean": 1.0}
    second.log({"loss": 5.0})
    assert second.summary["loss"] == {"min": 0.0, "max": 5.0, "mean": 2.0}
    second.finish()
    assert history(second) == [{"_step": 3, "loss": 5.0, "epoch": 2}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": ""}, "non-empty"),
        ({"name": 3}, "non-empty"),
        ({"name": "a*b"}, "at the end"),
        ({"name": "a", "step_metric": "b*"}, "one metric"),
        ({"name": "a", "summary": "min,median"}, "'median' is not known; choose of: min, max"),
        ({"name": "a", "goal": "up"}, "choose 'minimize' or 'maximize'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], words: str) -> None:
    """Proves that each argument that cannot be is named, and that nothing of the call is kept."""
    run = wbdist.init(project="p", settings={"quiet": True})
    with pytest.raises(wbdist.UsageError, match=words):
        run.define_metric(**arguments)
    run.finish()
    assert "m" not in shipped(run).wandb_config()["_wandb"]["value"]


def test_a_disabled_run_takes_definitions() -> None:
    """Proves that a script which defines metrics runs without tracking, and still finds its summary."""
    with wbdist.init(mode="disabled") as run:
        run.define_metric("loss", summary="max")
        run.log({"loss": 3})
        run.log({"loss": 2})
        assert run.summary["loss"] == {"max": 3}
