"""A job used at the wrong time is told so, before anything is touched."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import wbdist
from wbdist.distributed import coordination
from wbdist.errors import JobAlreadyRunningError, ShutdownError, UsageError
from wbdist.hooks.loader import ResumableLoader
from wbdist.job import handle, one_open
from wbdist.run import lifecycle
from wbdist.run.journal import find_journals

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")


def make(directory: str | None = "ck") -> wbdist.Job:
    return wbdist.job(project="p", checkpoint_dir=directory, notices="off")


def use(job: wbdist.Job) -> dict[str, Callable[[], object]]:
    """Every public method and property of a job, called."""
    model, data = torch.nn.Linear(1, 1), TensorDataset(torch.arange(8.0))
    calls: dict[str, Callable[[], object]] = {
        "ddp": lambda: job.ddp(model),
        "watch_ddp": lambda: job.watch_ddp(model),
        "loader": lambda: job.loader(data, batch_size=4),
        "track": lambda: job.track(model=model),
        "steps": lambda: next(job.steps(ResumableLoader(data, batch_size=4), epochs=9)),
        "log": lambda: job.log({"a": 1}),
        "log_at_close": lambda: job.log_at_close({"a": 1}, {"a": "sum"}),
        "should_stop": job.should_stop,
        "save": job.save,
    }
    names = [name for name in dir(type(job)) if not name.startswith("_")]
    properties = {name for name in names if isinstance(inspect.getattr_static(job, name), property)}
    assert set(names) == calls.keys() | properties, "a new member is called here, too"
    return calls | {name: lambda name=name: getattr(job, name) for name in properties}


def test_before_with_every_use_says_to_enter_it() -> None:
    """Proves that no method and no property of a job that was not entered is an AttributeError, or does half of its work."""
    for call in use(make()).values():
        with pytest.raises(UsageError, match=r"not open.*`with wbdist\.job\(\.\.\.\) as job:`"):
            call()
    with pytest.raises(AttributeError, match="no attribute 'lgo'"):
        _ = make().lgo  # type: ignore[attr-defined]
    assert not hasattr(make(), "_repr_html_"), "a notebook asks"


def test_after_with_what_it_was_is_known_and_nothing_more_can_be_done() -> None:
    """Proves that facts of a job that has ended can be read, and that what would change it says that it has ended."""
    with make() as job:
        job.log({"a": 1})
    for name, call in use(job).items():
        if name in {"track", "steps", "watch_ddp", "log", "log_at_close", "save"}:
            with pytest.raises(ShutdownError, match=rf"job\.{name.removesuffix('_at_close')}\(\) came after the `with` block"):
                call()
        else:
            call()
    with pytest.raises(UsageError, match=r"has ended; .* wbdist\.job"), job:
        raise AssertionError("it was entered again")


@pytest.mark.parametrize("again", ["the same", "on its directory", "another"])
def test_a_second_job_inside_one_is_refused_and_the_first_goes_on(again: str, tmp_path: Path) -> None:
    """Proves that entering a job within a job touches neither the directory nor the run, and that the first ends well."""
    with make() as first:
        first.track(model=torch.nn.Linear(1, 1))
        second = {"the same": first, "on its directory": make(), "another": make("other")}[again]
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match=r"open in this process already \(project='p', checkpoint_dir='.*/ck'\)"), second:
            raise AssertionError("it was entered")
        assert sorted(tmp_path.rglob("*")) == before
        first.log({"a": 1})
        first.save()
    assert (first.attempt, first.run.finished, lifecycle.active_runs()) == (1, True, [])
    with make() as third:
        assert third.attempt == 2


def test_only_a_job_that_is_open_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that neither a job that could not be opened, nor one that an error ended, nor a parent's is in the way of one."""
    failing = make()
    with monkeypatch.context() as patch:
        patch.setattr(handle, "decide", _refuse)
        with pytest.raises(JobAlreadyRunningError), failing:
            raise AssertionError("it was entered")
    with pytest.raises(ZeroDivisionError), failing:
        _ = 1 / 0
    with make():
        child = os.getpid() + 1
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: child)
            one_open.take("a forked child's")
    assert len(find_journals(Path("wandb"))) == 2


def test_each_job_of_a_process_meets_its_ranks_under_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a second job does not read what the ranks of the first have left in the launcher's store, and that ranks
    whose processes had other jobs before meet under the same name when the launcher gives a new one."""
    names: list[str | None] = []
    connect = coordination.connect

    def named(identity: Any, incarnation: str | None, **arguments: Any) -> Any:
        names.append(incarnation)
        return connect(identity, incarnation, **arguments)

    monkeypatch.setattr(coordination, "connect", named)
    for launcher in ("first", "first", "second", ""):
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "WBDIST_INCARNATION": launcher}.items():
            monkeypatch.setenv(name, value)
        if not launcher:
            monkeypatch.delenv("WBDIST_INCARNATION")
        with make():
            pass
        with wbdist.checkpoints("alone"):
            pass
    assert names == ["first/1", "first/2", "first/3", "first/4", "second/1", "second/2", None, None]


@pytest.mark.slow
def test_one_job_after_the_other_on_two_ranks(tmp_path: Path) -> None:
    """Proves it with real ranks under the launcher, where the second job used to wait without end."""
    script = tmp_path / "three.py"
    script.write_text(
        "import wbdist\n"
        "for n in (1, 2, 3):\n"
        "    with wbdist.job(project='p', checkpoint_dir='ck', notices='off') as job:\n"
        "        job.log({'n': n})\n"
        "        print('job', n, job.rank, job.attempt)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "wbdist", "launch", "--nproc", "2", "--max-restarts", "0", str(script)]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"job (\d \d \d)", done.stdout)) == ["1 0 1", "1 1 1", "2 0 2", "2 1 2", "3 0 3", "3 1 3"]


def _refuse(*_: Any) -> Any:
    raise JobAlreadyRunningError("somebody else has it")


def test_ddp_of_no_module_names_it() -> None:
    with make() as job, pytest.raises(UsageError, match=r"torch\.nn\.Module; got 5, a int"):
        job.ddp(5)  # type: ignore[arg-type]
