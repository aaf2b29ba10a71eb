"""FSDP2: shards saved by four ranks are restored by two, then by three, bit by bit; what cannot be is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import dying, fsdp
from support.ports import free_port
from torch.distributed.fsdp import fully_shard

from wbdist.checkpoint.manifest import committed, verify
from wbdist.checkpoint.sharded import adapted, check_shape
from wbdist.errors import StateMissingError, UsageError


def run(directory: Path, ranks: int, attempt: int, until: int) -> tuple[dict[str, str], dict[str, str]]:
    """State before and after the attempt's training, whole tensors."""
    context, port = dying.context(), free_port()
    results: Any = context.Queue()
    processes = [
        context.Process(target=fsdp.train, args=(directory, rank, (ranks, attempt, until), port, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = results.get(timeout=100)
    assert [dying.ended(process) for process in processes] == [0] * ranks
    return found


def test_two_ranks_to_one(tmp_path: Path) -> None:
    """What two ranks saved in shards arrives whole on one."""
    _, two = run(tmp_path, 2, 1, 2)
    begun_with, one = run(tmp_path, 1, 2, 3)
    assert begun_with == two != one


@pytest.mark.slow
def test_resharding(tmp_path: Path) -> None:
    """4 -> 2 -> 3 ranks: parameters, moments, step counts, buffers and schedule arrive whole and equal each time."""
    _, four = run(tmp_path, 4, 1, 3)
    begun_with, two = run(tmp_path, 2, 2, 5)
    assert begun_with == four
    assert two != four
    begun_with, three = run(tmp_path, 3, 3, 6)
    assert begun_with == two
    assert three != two
    newest = committed(tmp_path)[0]
    verify(newest)
    assert sum(name.startswith("shared/") and name.endswith(".safetensors") for name in newest.files) == 3


def test_an_optimizer_without_its_module() -> None:
    """The names that sharded optimizer state is saved under are the module's: without it, an error that says so."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = fully_shard(torch.nn.Linear(2, 2))
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(UsageError, match=r"'optimizer' optimises sharded parameters .* not tracked"):
            adapted({"optimizer": optimizer})
        # Before its first step it has no state, and saving it makes none: torch's own function would take a step.
        state = adapted({"model": model, "optimizer": optimizer})["optimizer"].state_dict()
        assert not optimizer.state
        fresh = torch.optim.AdamW(model.parameters(), lr=0.5)
        adapted({"model": model, "optimizer": fresh})["optimizer"].load_state_dict(state)
        assert not fresh.state
        assert fresh.param_groups[0]["lr"] == 1e-3
        with pytest.raises(StateMissingError, match=r"has shape \[3, 2\] in the checkpoint, but \[2, 2\]"):
            check_shape("model.weight", (3, 2), model.state_dict()["weight"])
    finally:
        dist.destroy_process_group()
