"""`watch`: histograms of gradients and parameters; `alert`."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.journals import assembled
from torch import nn

import wbdist
from wbdist.core.position import ALERTS
from wbdist.run.alerts import AlertLevel, Alerts
from wbdist.run.disabled import NoJournal
from wbdist.run.journal import JournalReader, Kind
from wbdist.run.watching import count, histograms

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def run() -> wbdist.Run:
    return wbdist.init(project="p", settings={"quiet": True, "x_disable_stats": True})


def rows(run: wbdist.Run) -> list[dict[str, Any]]:
    assert run.journal_path is not None
    with JournalReader.open(run.journal_path) as reader:
        closed, unfinished = assembled(reader)
        return closed + unfinished


def train(run: wbdist.Run, model: nn.Module, batches: int) -> None:
    for _ in range(batches):
        model(torch.ones(2, 3)).sum().backward()
        run.log({"loss": 1.0})


def watched_in(found: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
    return [(row["_step"], sorted(key for key in row if "/" in key)) for row in found if any("/" in key for key in row)]


@pytest.mark.parametrize(
    ("log", "keys"),
    [
        ("gradients", ["gradients/bias", "gradients/weight"]),
        ("parameters", ["parameters/bias", "parameters/weight"]),
        ("all", ["gradients/bias", "gradients/weight", "parameters/bias", "parameters/weight"]),
    ],
)
def test_every_so_many_batches(run: wbdist.Run, log: Any, keys: list[str]) -> None:
    """Proves what is kept and in which rows: those of the batches looked at, complete, beside what the script logs there."""
    model = nn.Linear(3, 4)
    wbdist.watch(model, log=log, log_freq=3)
    model.eval()
    model(torch.ones(1, 3))
    model.train()
    train(run, model, 7)
    found = rows(run)
    assert watched_in(found) == [(2, keys), (5, keys)]
    assert all(row["loss"] == 1.0 for row in found)
    for key in keys:
        assert sum(found[2][key]["values"]) == (12 if key.endswith("weight") else 4)
    run.unwatch(model)
    train(run, model, 3)
    assert watched_in(rows(run)) == [(2, keys), (5, keys)]
    assert not model._forward_pre_hooks
    assert not model.weight._backward_hooks


def test_gradients_are_those_of_the_backward_pass(run: wbdist.Run) -> None:
    """Proves values against numpy, with frozen parameters left out."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    run.watch(model, log_freq=1)
    x = torch.randn(5, 3)
    (model(x) ** 2).sum().backward()
    run.log({})
    assert model.weight.grad is not None
    (row,) = rows(run)
    assert "gradients/bias" not in row
    expected = model.weight.grad.numpy().ravel()
    assert row["gradients/weight"]["bins"][0] == pytest.approx(expected.min())
    assert row["gradients/weight"]["bins"][-1] == pytest.approx(expected.max())
    assert sum(row["gradients/weight"]["values"]) == 6


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(-3, 5, 1000),
        torch.tensor([2.0] * 7),
        torch.tensor([1.0, math.nan, math.inf, -math.inf, 3.0]),
        torch.tensor([math.nan]),
        torch.tensor([]),
        torch.arange(10, dtype=torch.bfloat16),
        torch.sparse_coo_tensor([[0, 2]], [1.0, 4.0], (5,)),
    ],
    ids=["many", "equal", "odd", "nan", "empty", "half", "sparse"],
)
def test_a_histogram_is_numpys_of_what_is_finite(values: torch.Tensor) -> None:
    """Proves counts and edges, of what is finite, for every kind of tensor."""
    dense = (values.coalesce().values() if values.is_sparse else values).float().numpy()
    dense = dense[np.isfinite(dense)]
    counts, edges = np.histogram(dense, bins=64)
    found = histograms({"k": count(values)})["k"]
    assert found["_type"] == "histogram"
    assert found["bins"] == pytest.approx(edges.tolist(), abs=1e-6)
    assert sum(found["values"]) == counts.sum() == len(dense)
    if len(dense) < 500:  # at an edge, rounding may choose the neighbour
        assert np.nonzero(found["values"])[0].tolist() == np.nonzero(counts)[0].tolist() or len(set(dense)) == 1


def test_a_model_in_ddp(run: wbdist.Run, tmp_path: Any) -> None:
    """Proves that watching a DDP model keeps its gradients and changes neither them nor the training."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = nn.Linear(3, 4)
        model = nn.parallel.DistributedDataParallel(plain)
        run.watch(model, log_freq=2)
        train(run, model, 4)
        keys = ["gradients/module.bias", "gradients/module.weight"]
        assert watched_in(rows(run)) == [(1, keys), (3, keys)]
        assert plain.weight.grad is not None
        assert plain.weight.grad.tolist() == [[8.0] * 3] * 4  # 4 batches of 2 rows of ones
    finally:
        dist.destroy_process_group()


def test_several_models_errors_and_the_end(run: wbdist.Run) -> None:
    """Proves prefixes, what is refused, and that training goes on when the run has ended."""
    one, two = nn.Linear(3, 1), nn.Linear(3, 1)
    run.watch([one, two], log="parameters", log_freq=1)
    one(torch.ones(1, 3))
    two(torch.ones(1, 3))
    run.log({})
    assert {key for key in rows(run)[0] if "/" in key} == {
        "parameters/weight", "parameters/bias", "parameters/graph_1weight", "parameters/graph_1bias",
    }  # fmt: skip
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: run.watch(one), "already"),
        (lambda: run.watch(3), "torch.nn.Module, not int"),
        (lambda: run.watch(nn.Linear(1, 1), log="grads"), "choose 'gradients'"),  # type: ignore[arg-type]
        (lambda: run.watch(nn.Linear(1, 1), log_freq=0), "1 or more"),
        (lambda: run.watch(nn.Linear(1, 1), log_graph=True), "graph"),
    ]
    for call, words in refused:
        with pytest.raises(wbdist.UsageError, match=words):
            call()
    run.finish()
    one(torch.ones(1, 3)).sum().backward()


def test_alert(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that an alert is on the terminal, one line of the run's output and in its journal; that it counts in the position,
    so that checkpoints keep it; and that bad ones are refused."""
    run = wbdist.init(project="p", settings={"quiet": True})
    wbdist.alert("Loss", "is NaN", level=wbdist.AlertLevel.WARN)
    wbdist.alert("Loss", "is NaN", level="WARN")
    assert capsys.readouterr().err.count("ALERT WARN Loss: is NaN") == 1
    with pytest.raises(wbdist.UsageError, match="INFO, WARN, ERROR"):
        run.alert("t", "x", level="LOUD")
    run.log({"x": 1})
    run.alert("second", "", wait_duration=0)
    assert run.position().watermark.counts[ALERTS] == {run.writer: 2}
    run.finish()
    assert run.journal_path is not None
    with JournalReader.open(run.journal_path) as reader:
        records = reader.read()
    lines = [record.data["text"] for record in records if record.kind is Kind.CONSOLE]
    assert [
        line.endswith(end) for line, end in zip(lines, ("ALERT WARN Loss: is NaN", "ALERT INFO second: "), strict=True)
    ] == [True] * 2
    first, second = [record.data for record in records if record.kind is Kind.ALERT]
    assert first == {"title": "Loss", "text": "is NaN", "level": "WARN", "wait": 60.0, "_step": 0}
    assert second["_step"] == 1


def test_an_alert_is_said_again_after_its_wait() -> None:
    """Proves the pause per title."""
    said: list[str] = []
    alerts = Alerts(NoJournal(0, {}), said.append)
    assert alerts.alert("a", "1", None, timedelta(seconds=5), now=0.0)
    assert alerts.alert("b", "1", AlertLevel.ERROR, 5, now=1.0)
    assert not alerts.alert("a", "2", None, 5, now=4.9)
    assert alerts.alert("a", "3", None, 5, now=5.0)
    assert not alerts.alert("a", "4", None, None, now=64.0)
    assert said == ["ALERT INFO a: 1", "ALERT ERROR b: 1", "ALERT INFO a: 3"]
