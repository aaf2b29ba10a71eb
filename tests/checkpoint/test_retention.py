"""Which checkpoints stay: the last, every n-th, the best; only committed ones count, and a removal cut short leaves no half."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ranks import alone
from support.training import position

from wbdist.checkpoint import retention
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import VERSION, Manifest, committed
from wbdist.checkpoint.retention import Keep
from wbdist.errors import UsageError

LOSSES = {1: 0.9, 2: 0.2, 3: 0.5, 4: 0.7, 5: float("nan"), 6: 0.8}


def train(directory: Path, layer: FileLayer | None = None, **keep: Any) -> list[int]:
    """Saves steps 1 to 6 with the losses above; what is committed then, newest first."""
    with Checkpointer(directory, alone(), attempt=1, layer=layer, **keep) as checkpoints:
        checkpoints.track(model=torch.nn.Linear(2, 2))
        for step, loss in LOSSES.items():
            where = msgspec.structs.replace(position(step), summary={"loss": loss, "acc": -loss, "name": "x"})
            checkpoints.save(step, where, block=True, timeout=20)
    return [manifest.step for manifest in committed(directory)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep_last": 2}, [6, 5]),
        ({"keep_last": 1, "keep_every": 3}, [6, 3]),
        ({"keep_last": 2, "keep_best": "loss"}, [6, 5, 2]),
        ({"keep_last": 1, "keep_best": "max:acc", "keep_every": 4}, [6, 4, 2]),
        ({"keep_last": 1, "keep_best": "max:loss"}, [6, 1]),
        ({"keep_last": 1, "keep_best": "min:name"}, [6]),
        ({"keep_last": 1, "keep_best": "nothing"}, [6]),
    ],
)
def test_rules(tmp_path: Path, keep: dict[str, Any], left: list[int]) -> None:
    """Each rule keeps its own; NaN and what is no number is never the best."""
    assert train(tmp_path, **keep) == left


def test_the_one_in_use_stays(tmp_path: Path) -> None:
    """What this attempt was restored from is there as long as the attempt is."""
    train(tmp_path, keep_last=6)
    shutil.rmtree(tmp_path / "step-6.a1")
    model = torch.nn.Linear(2, 2)
    with Checkpointer(tmp_path, alone(), attempt=2, keep_last=1) as checkpoints:
        checkpoints.track(model=model)
        restored = checkpoints.restore(timeout=20)
        assert restored is not None
        for step in (6, 7):
            checkpoints.save(step, position(step, 2), block=True, timeout=20)
        assert [manifest.name for manifest in committed(tmp_path)] == ["step-7.a2", "step-5.a1"]


class CutShort(FileLayer):
    """Every removal stops in its middle, as when the process is killed there: the first file is gone, the rest is not."""

    def remove_tree(self, path: Path) -> None:
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        raise OSError("cut short")


def test_removals_cut_short(tmp_path: Path) -> None:
    """What is half removed counts for nothing, and is gone after the next start."""
    assert train(tmp_path, CutShort(), keep_last=2) == [6, 5]
    assert len(list(tmp_path.glob("*.removed.tmp"))) == 4
    with Checkpointer(tmp_path, alone(), attempt=2) as checkpoints:
        chosen = checkpoints.choose(20)
    assert chosen is not None
    assert chosen.name == "step-6.a1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-5.a1", "step-6.a1"]


def test_only_committed_ones_count(tmp_path: Path) -> None:
    """A damaged manifest and an unfinished directory neither use up `keep_last` nor are removed by it."""
    train(tmp_path, keep_last=6)
    (tmp_path / "step-6.a1" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "step-9.a1.tmp").mkdir()
    retention.prune(FileLayer(), tmp_path, Keep(2), set())
    assert [manifest.step for manifest in committed(tmp_path)] == [5, 4]
    assert {"step-6.a1", "step-9.a1.tmp"} <= {path.name for path in tmp_path.iterdir()}


@given(st.lists(st.integers(0, 40), unique=True, max_size=12), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 9)))
def test_a_rule_never_takes_more(steps: list[int], last: int, every: int | None) -> None:
    """Adding a rule only ever keeps more, and the newest stays under any."""
    newest_first = [_manifest(step) for step in sorted(steps, reverse=True)]
    alone_doomed = Keep(last).doomed(newest_first)
    both = Keep(last, every, "loss").doomed(newest_first)
    assert {manifest.step for manifest in both} <= {manifest.step for manifest in alone_doomed}
    assert newest_first[:last] == [manifest for manifest in newest_first if manifest not in alone_doomed]


def _manifest(step: int) -> Manifest:
    where = msgspec.structs.replace(position(step), summary={"loss": abs(step - 20)})
    return Manifest(
        version=VERSION,
        step=step,
        attempt=1,
        runs=(where,),
        world_size=1,
        shared=(),
        per_rank=(),
        files={},
        created=0.0,
        environment={},
        kinds={},
        config_hash="",
    )


@pytest.mark.parametrize("keep", [Keep(0), Keep(1, 0), Keep(1, None, "max:"), Keep(1, None, "")])
def test_rules_that_make_no_sense(keep: Keep) -> None:
    """Refused before anything is saved."""
    with pytest.raises(UsageError, match="keep_"):
        keep.check()
