"""Filters and order of runs: W&B's subset of MongoDB's language."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from wbdist.core.states import RunState
from wbdist.server.run_filters import compile_filter, ordered
from wbdist.server.store.interface import RunRow


def run(pk: int, **fields: Any) -> RunRow:
    texts = ("group", "job_type", "notes", "host", "program", "commit", "repo", "sweep")
    base: dict[str, Any] = {
        "pk": pk, "storage_id": str(pk), "entity": "local", "project": "p", "run_id": f"r{pk}", "display_name": f"run {pk}",
        "state": RunState.FINISHED, "config": {}, "summary": {}, "tags": [], "created_at": 1000.0 + pk, "heartbeat_at": 2000.0,
        "attempt": 0, "line_counts": {}, "last_step": -1, "metrics": [], "version": 0, **dict.fromkeys(texts, ""),
    }  # fmt: skip
    return RunRow(**(base | fields))


RUNS = [
    run(1, group="a", config={"lr": {"value": 0.1}}, summary={"loss": 3.0}, tags=["x", "y"], metrics=["loss"]),
    run(2, group="a", config={"lr": {"value": 0.2}, "opt": {"value": {"name": "sgd"}}}, summary={"loss": 1}, job_type="train"),
    run(3, group="b", state=RunState.CRASHED, summary={"loss": float("nan"), "a.b": 7}, display_name="Third"),
    run(4, state=RunState.RUNNING, summary={"loss": "high", "d": {"e": 1}}, config={"flag": {"value": True}}),
]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, [1, 2, 3, 4]),
        ({"group": "a"}, [1, 2]),
        ({"state": "crashed"}, [3]),
        ({"state": {"$in": ["crashed", "running"]}}, [3, 4]),
        ({"state": {"$nin": ["crashed", "running"]}}, [1, 2]),
        ({"tags": "x"}, [1]),
        ({"tags": {"$in": ["y", "z"]}}, [1]),
        ({"tags": {"$ne": "x"}}, [2, 3, 4]),
        ({"config.lr": 0.1}, [1]),
        ({"config.lr.value": {"$gt": 0.1}}, [2]),
        ({"config.opt.name": "sgd"}, [2]),
        ({"config.opt.value.name": "sgd"}, [2]),
        ({"config.lr": {"$exists": False}}, [3, 4]),
        ({"config.flag": True}, [4]),
        ({"config.flag": 1}, []),
        ({"summary_metrics.loss": {"$lt": 2}}, [2]),
        ({"summary_metrics.loss": {"$gte": 1, "$lte": 3}}, [1, 2]),
        ({"summary_metrics.loss": 1.0}, [2]),
        ({"summary_metrics.a.b": 7}, [3]),
        ({"summary_metrics.d.e": 1}, [4]),
        ({"jobType": "train"}, [2]),
        ({"displayName": {"$regex": "^Th"}}, [3]),
        ({"name": {"$not": {"$eq": "r1"}}}, [2, 3, 4]),
        ({"$or": [{"group": "b"}, {"name": "r1"}]}, [1, 3]),
        ({"$and": [{"group": "a"}, {"summary_metrics.loss": {"$lt": 2}}]}, [2]),
        ({"$nor": [{"group": "a"}]}, [3, 4]),
        ({"$not": {"group": "a"}}, [3, 4]),
        ({"created_at": {"$gt": "1970-01-01T00:16:42Z"}}, [3, 4]),
        ({"keys_info.keys.loss": {"$exists": True}}, [1]),
        ({"group": None}, []),
        ({"config.nothing": None}, [1, 2, 3, 4]),
    ],
)
def test_filters_select(query: dict[str, Any], expected: list[int]) -> None:
    """Proves that every operator and key selects what MongoDB's would."""
    passes = compile_filter(json.dumps(query))
    assert [row.pk for row in RUNS if passes(row)] == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, [1, 2, 3, 4]),
        ("-created_at", [4, 3, 2, 1]),
        ("+summary_metrics.loss", [2, 1, 4, 3]),
        ("-summary_metrics.loss", [4, 1, 2, 3]),
        ("config.lr.value", [1, 2, 3, 4]),
        ("-config.lr.value", [2, 1, 3, 4]),
    ],
)
def test_order(order: str | None, expected: list[int]) -> None:
    """Proves that runs without the key, or with NaN, stand last in both directions, and equal ones by creation."""
    assert [row.pk for row in ordered(RUNS[::-1], order)] == expected


@pytest.mark.parametrize(
    "text",
    [
        "[]", "nonsense", '{"$where": "1"}', '{"nosuch": 1}', '{"state": {"$near": 1}}', '{"$and": 3}',
        '{"state": {"$in": "x"}}', '{"created_at": "yesterday"}', '{"name": {"$regex": "("}}', '{"name": {"$regex": 5}}',
        '{"name": {"$regex": "(a)\\\\1"}}', '{"$not":' * 30 + "{}" + "}" * 30,
    ],
)  # fmt: skip
def test_bad_filters_are_named(text: str) -> None:
    """Proves that senseless filters are ValueErrors with a message, not crashes or empty lists."""
    with pytest.raises(ValueError, match=r"\w+"):
        compile_filter(text)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a*)*b", "(?:a|aa)+$", "(.*a){20}", ".*.*.*.*.*x", "((a{1,9}){1,9}){1,9}$"])
def test_no_pattern_can_hang_the_server(pattern: str) -> None:
    """Proves that a pattern either is refused or answers fast on a hostile name: the matcher would hold the GIL."""
    try:
        passes = compile_filter(json.dumps({"display_name": {"$regex": pattern}}))
    except ValueError:
        return
    started = time.monotonic()
    for length in (30, 200, 5000):
        passes(run(1, display_name="a" * length + "!"))
    assert time.monotonic() - started < 1
