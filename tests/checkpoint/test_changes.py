"""What changed between a checkpoint and the job that starts from it: an error that names it, or a note; never silence."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.ranks import ThreadCoordinator, alone, run_ranks
from support.training import position

from wbdist.checkpoint import environment, rng
from wbdist.checkpoint.changes import Allowed, check_config, digest, normal
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.manifest import MANIFEST, committed, seal
from wbdist.checkpoint.restore import Restored
from wbdist.errors import ConfigError, StateMissingError, UsageError


def save(directory: Path, config: dict[str, Any], **tracked: Any) -> None:
    with Checkpointer(directory, alone(), attempt=1, config=config) as checkpoints:
        checkpoints.track(**tracked)
        checkpoints.save(1, position(1), block=True, timeout=20)


def restore(directory: Path, config: dict[str, Any], tracked: dict[str, Any] | None = None, **said: Any) -> Restored:
    checkpoints = Checkpointer(directory, alone(), attempt=2, config=config, **said)
    checkpoints.track(**tracked or {})
    restored = checkpoints.restore(timeout=20)
    assert restored is not None
    return restored


def test_a_changed_config_is_refused_by_default(tmp_path: Path) -> None:
    """Each changed key is named with both values and with what to do, nested ones too; nothing was loaded."""
    config = {"lr": 0.1, "net": {"depth": 2, "act": "relu"}, "data_dir": "/a"}
    save(tmp_path, config, model=torch.nn.Linear(2, 2))
    model = torch.nn.Linear(2, 2)
    before = model.weight.tolist()
    changed = {"lr": 0.2, "net": {"depth": 3, "act": "relu"}, "data_dir": "/b", "wd": 0.5}
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path, changed, {"model": model})
    said = str(caught.value)
    assert "step-1.a1 was made with another config: lr 0.1 -> 0.2, net.depth 2 -> 3, wd absent -> 0.5. " in said
    assert "config_changes=['lr', 'net.depth', 'wd']" in said
    assert "WBDIST_CONFIG_CHANGES=lr,net.depth,wd" in said
    assert caught.value.exit_code == 65
    assert model.weight.tolist() == before
    with pytest.raises(ConfigError, match=r"lr 0.1 -> absent, net.act \"relu\" -> absent"):
        restore(tmp_path, {}, {"model": model})
    for allowed in ("allow", ["lr", "net", "wd"], "lr, net.*, w?"):
        notes = restore(tmp_path, changed, {"model": model}, config_changes=allowed).notes
        assert len(notes) == 1
        assert 'data_dir "/a" -> "/b", lr 0.1 -> 0.2, net.depth 2 -> 3, wd absent -> 0.5' in notes[0]
    with pytest.raises(ConfigError, match=r"another config: net.depth 2 -> 3\. "):
        restore(tmp_path, changed, {"model": model}, config_changes=["lr", "wd"])


def test_one_change_is_everybodys_error(tmp_path: Path) -> None:
    """A rank that was started with another config stops all, and is named."""

    def save_on(ranks: ThreadCoordinator) -> None:
        with Checkpointer(tmp_path, ranks, attempt=1, config={"lr": 0.1}) as checkpoints:
            checkpoints.save(1, position(1), timeout=20)

    def restore_on(ranks: ThreadCoordinator) -> None:
        Checkpointer(tmp_path, ranks, attempt=2, config={"lr": 0.1 + ranks.rank}).restore(timeout=20)

    assert run_ranks(2, save_on) == [None, None]
    for outcome in run_ranks(2, restore_on):
        assert isinstance(outcome, ConfigError)
        assert "rank 1" in str(outcome)
        assert "rank 0" not in str(outcome)


@pytest.mark.parametrize(
    "key",
    ["data_dir", "paths.root", "world_size", "launch.nproc_per_node", "num-workers", "device", "SLURM_JOB_ID", "hostname"],
)
def test_where_and_how_wide_a_job_runs_is_let_through(key: str) -> None:
    """What a requeue changes by itself is said, not refused."""
    (note,) = check_config("c", digest({key: 1}), {key: 1}, {key: "x"}, Allowed())
    assert f"{key} 1 -> " in note


@pytest.mark.parametrize("values", [("/scratch/1/x", "/scratch/2/x"), ("s3://a/b", "~/b"), ("./a", "../b")])
def test_values_that_are_places_are_let_through(values: tuple[str, str]) -> None:
    """Under whatever key."""
    (note,) = check_config("c", digest({"train": values[0]}), {"train": values[0]}, {"train": values[1]}, Allowed())
    assert values[1] in note


@pytest.mark.parametrize("key", ["epochs", "batch_size", "seed", "model", "lr", "hidden", "filepath_count"])
def test_what_decides_the_training_is_not(key: str) -> None:
    """A longer training is another schedule: that, too, is to be said."""
    with pytest.raises(ConfigError):
        check_config("c", digest({key: 1}), {key: 1}, {key: 2}, Allowed())
    with pytest.raises(ConfigError):
        check_config("c", digest({key: "/a"}), {key: "/a"}, {key: "a"}, Allowed())


def test_a_config_is_the_same_in_every_process() -> None:
    """Sets, functions, objects, NaN, tuples, huge numbers: equal for equal values, whatever addresses and hashes are."""
    script = (
        "import decimal, pathlib, msgspec\n"
        "from wbdist.checkpoint.changes import digest, normal\n"
        "class Odd: pass\n"
        "config = {'set': {'a', 'b', 'c', 1}, 'f': lambda: 0, 'odd': Odd(), 'nan': float('nan'), 'inf': [-float('inf')],\n"
        "          'huge': 2**70, 't': (1, 2), 'type': decimal.Decimal('0.1'), 'p': pathlib.Path('/x'), 'd': {1: 2, '3': {}}}\n"
        "found = normal(config)\n"
        "assert normal(found) == found == msgspec.json.decode(msgspec.json.encode(found))\n"
        "print(digest(found), found)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate(timeout=60)[0] for run in runs)
    assert first == second != ""
    assert "'set': ['a', 'b', 'c', 1]" in first


@pytest.mark.parametrize("said", ["error,lr", ["allow", "lr"], ["lr", ""]])
def test_what_cannot_be_meant(said: Any) -> None:
    """Mixed words are refused when the job is made."""
    with pytest.raises(UsageError, match="config_changes"):
        Checkpointer("unused", alone(), attempt=1, config_changes=said)


def test_a_checkpoint_without_its_config_is_refused(tmp_path: Path) -> None:
    """Dropping the config or its hash does not pass for 'no config'."""
    save(tmp_path, {"lr": 0.1})
    for drop in ({"config": {}}, {"config_hash": ""}, {"config": {}, "config_hash": ""}):
        manifest = committed(tmp_path)[0]
        path = Path(manifest.directory) / MANIFEST
        whole = path.read_bytes()
        path.write_bytes(seal(msgspec.structs.replace(manifest, **drop)))
        for said in ({}, {"config_changes": "allow"}):
            with pytest.raises(ConfigError, match=r"does not hold the config that it was made with"):
                restore(tmp_path, {"lr": 0.1}, **said)
        path.write_bytes(whole)
    assert restore(tmp_path, {"lr": 0.1}).notes == ()


@pytest.mark.parametrize(
    ("fact", "refused"),
    [
        *((fact, True) for fact in ("accelerator", "default_dtype", "deterministic", "float32_matmul_precision")),
        *((fact, False) for fact in ("python", "torch", "numpy", "machine", "threads")),
    ],
)
def test_environment_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: str, refused: bool) -> None:
    """The script's switches must be the same; what an image or another machine changes is a note. Absent is a change."""
    save(tmp_path, {})
    here = environment.facts()
    changed = ({**here, fact: "other"}, {name: value for name, value in here.items() if name != fact})
    for found, told in zip(changed, ("other", "absent"), strict=True):
        monkeypatch.setattr(environment, "facts", lambda found=found: found)
        if refused:
            with pytest.raises(ConfigError, match=f"{fact} .* -> {told}.*environment_changes"):
                restore(tmp_path, {})
            restore(tmp_path, {}, environment_changes=[fact])
        else:
            assert restore(tmp_path, {}).notes == (
                f"the environment has changed since step-1.a1: {fact} {here[fact]} -> {told}",
            )


def test_switches_that_the_script_sets_after_restoring_do_not_count(tmp_path: Path) -> None:
    """The facts are those at the restore, in each attempt: the same script at the same line."""
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        assert checkpoints.restore(timeout=20) is None
        torch.set_float32_matmul_precision("high")
        try:
            checkpoints.save(1, position(1), block=True, timeout=20)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert restore(tmp_path, {}).notes == ()


@pytest.mark.parametrize("generator", ["python", "torch", "numpy"])
def test_a_missing_generator_is_an_error(generator: str) -> None:
    """And none of the others was touched."""
    state = rng.capture()
    del state[generator]
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    before = (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state(legacy=False)["state"]["pos"])
    with pytest.raises(StateMissingError, match=rf"no state of the random generators \['{generator}'\]"):
        rng.restore(state)
    assert before == (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state(legacy=False)["state"]["pos"])


def test_values_of_another_type_are_not_converted(tmp_path: Path) -> None:
    """torch would load float32 weights into a bfloat16 model, and back, without a word."""
    save(tmp_path, {}, model=torch.nn.Linear(2, 2))
    with pytest.raises(StateMissingError, match=r"model.weight has type torch.float32 in the checkpoint, but torch.bfloat16"):
        restore(tmp_path, {}, {"model": torch.nn.Linear(2, 2).bfloat16()})


def test_state_of_another_type_than_its_parameters_keeps_its_bits(tmp_path: Path) -> None:
    """float32 master weights of bfloat16 parameters: torch's own load_state_dict makes them bfloat16."""

    class Master(torch.optim.Optimizer):
        def __init__(self, weight: torch.nn.Parameter) -> None:
            super().__init__([weight], {"lr": 0.1})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            (weight,) = self.param_groups[0]["params"]
            self.state[weight].setdefault("master", weight.float()).sub_(weight.grad.float(), alpha=0.1)
            weight.copy_(self.state[weight]["master"])

    def trained(steps: int, weight: torch.nn.Parameter, optimizer: Master) -> list[int]:
        for step in range(steps):
            weight.grad = torch.rand(16, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()
        return optimizer.state[weight]["master"].view(torch.int32).tolist()

    first = torch.nn.Parameter(torch.ones(16).bfloat16())
    optimizer = Master(first)
    trained(3, first, optimizer)
    save(tmp_path, {}, optimizer=optimizer)
    second = torch.nn.Parameter(first.detach().clone())
    again = Master(second)
    restore(tmp_path, {}, {"optimizer": again})
    assert again.state[second]["master"].dtype == torch.float32
    assert trained(3, second, again) == trained(3, first, optimizer)


def test_another_optimizer_or_schedule_is_refused(tmp_path: Path) -> None:
    """They load each other's states, and go on with nonsense."""
    weight = torch.nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([weight], lr=0.1)
    save(tmp_path, {}, optimizer=sgd, schedule=torch.optim.lr_scheduler.StepLR(sgd, 2))
    adam = torch.optim.Adam([weight], lr=0.1)
    with pytest.raises(StateMissingError, match=r"'optimizer' is a SGD in step-1.a1, but this job tracks a Adam"):
        restore(tmp_path, {}, {"optimizer": adam, "schedule": torch.optim.lr_scheduler.StepLR(adam, 2)})
    with pytest.raises(StateMissingError, match=r"'schedule' is a StepLR in step-1.a1, but this job tracks a ConstantLR"):
        restore(tmp_path, {}, {"optimizer": sgd, "schedule": torch.optim.lr_scheduler.ConstantLR(sgd)})


def test_names_are_normalised_once() -> None:
    """Whatever goes into a manifest compares equal with itself when it is read back."""
    config = {"a": (1, 2.5), 3: {"x": None, "y": True}}
    found = normal(config)
    assert check_config("c", digest(found), found, normal(config), Allowed()) == []
