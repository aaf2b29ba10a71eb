"""The summary as scripts change it by hand."""

from __future__ import annotations

import json

import pytest

import wbdist

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(params=[False, True], ids=["plain", "defined"])
def run(request: pytest.FixtureRequest) -> wbdist.Run:
    """Also with defined metrics: the summary then comes from the journal."""
    opened = wbdist.init(project="p", settings={"quiet": True})
    if request.param:
        opened.define_metric("other", summary="max")
    return opened


def test_set_update_delete(run: wbdist.Run) -> None:
    """Proves item and attribute access, `update`, `get`, deletion, and that rows overwrite what was set."""
    run.summary["a"] = 1
    run.summary.b = 2
    run.summary.update({"c": 3, "loss": 9})
    run.log({"loss": 0.5})
    assert (run.summary.a, run.summary["b"], run.summary.get("c"), run.summary.get("none", 7)) == (1, 2, 3, 7)
    assert run.summary["loss"] == 0.5
    del run.summary["a"]
    del run.summary.b
    assert "a" not in run.summary
    assert "b" not in run.summary
    for delete in (lambda: run.summary.__delitem__("a"), lambda: run.summary.__delattr__("b")):
        with pytest.raises((KeyError, AttributeError)):
            delete()
    run.log({"x": 1})
    assert "a" not in run.summary


def test_what_is_changed_inside_a_nested_value_is_kept(run: wbdist.Run) -> None:
    """Proves that nested assignment, update and deletion reach the journal, and that a dict handed in is not held on to."""
    given = {"x": {"y": 1}}
    run.summary["d"] = given
    given["x"]["y"] = 5
    run.summary["d"]["x"]["y"] = 2
    run.summary["d"]["x"].update({"z": 3, "gone": 4})
    del run.summary["d"]["x"]["gone"]
    run.summary["d"].x.deep = {"er": 1}
    nested = run.summary["d"]
    assert nested == {"x": {"y": 2, "z": 3}}
    nested["x"]["w"] = {}
    nested["x"]["w"]["v"] = 1
    assert run.summary["d"] == {"x": {"y": 2, "z": 3, "w": {"v": 1}}} == nested
    assert json.loads(json.dumps(nested)) == nested
    shown = run.summary.as_dict()
    shown["d"]["x"].clear()
    assert run.summary["d"]["x"]["y"] == 2


def test_errors(run: wbdist.Run) -> None:
    """Proves that a bad update changes nothing and names the key."""
    with pytest.raises(TypeError, match="bad"):
        run.summary.update({"good": 1, "bad": object()})
    with pytest.raises(wbdist.UsageError, match="string"):
        run.summary.update({1: 2})  # type: ignore[dict-item]
    assert "good" not in run.summary
    run.finish()
    with pytest.raises(wbdist.UsageError, match="finished"):
        run.summary["late"] = 1
    assert "late" not in run.summary
