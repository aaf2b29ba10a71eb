"""What `log` does: the step rule, values, positions, summary, threads, and its errors."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.journals import history_of

import wbdist
from wbdist.core.position import CONSOLE, HISTORY, RunPosition
from wbdist.errors import DiskFullError
from wbdist.run.handle import Run
from wbdist.run.init import make_spec
from wbdist.run.journal import JournalReader, JournalWriter, Kind
from wbdist.run.journal_storage import refuse
from wbdist.run.lifecycle import open_run
from wbdist.settings import resolve

pytestmark = pytest.mark.usefixtures("offline")


def rows(run: Run) -> list[dict[str, Any]]:
    """The history that a server will get from the run's journal."""
    assert run.journal_path is not None
    return history_of(run.journal_path)


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in {"_timestamp", "_runtime"}} for row in found]


def test_step_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves W&B's rule: no step commits, equal steps merge, a greater one closes, a smaller one is dropped and said."""
    run = wbdist.init(project="p", settings={"quiet": True})
    run.log({"a": 1})
    run.log({"b": 2}, commit=False)
    run.log({"c": 3})
    run.log({"d": 4}, step=7)
    run.log({"e": 5}, step=7)
    run.log({"late": 1}, step=3)
    run.log({"f": 6}, step=9, commit=True)
    run.log({})
    assert run.step == 11
    assert run.dropped_rows == 1
    run.finish()
    assert without_times(rows(run)) == [
        {"_step": 0, "a": 1},
        {"_step": 1, "b": 2, "c": 3},
        {"_step": 7, "d": 4, "e": 5},
        {"_step": 9, "f": 6},
        {"_step": 10},
    ]
    said = capsys.readouterr().err
    assert "log(step=3)" in said
    assert "current step is 7" in said


def test_many_dropped_rows_are_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a loop of late rows does not flood the terminal, and that the count is kept."""
    run = wbdist.init(project="p", settings={"quiet": True})
    run.log({"a": 1}, step=5)
    for step in range(5):
        run.log({"a": 1}, step=step)
    assert capsys.readouterr().err.count("dropped") == 1
    assert run.dropped_rows == 5


def test_values_of_other_libraries_become_plain() -> None:
    """Proves that nested dicts flatten and numpy and torch scalars become numbers, exactly; reserved keys are dropped."""
    run = wbdist.init(project="p")
    value = np.float32(0.1)
    run.log({"np": value, "int": np.int64(7), "torch": torch.tensor(0.25, requires_grad=True), "flag": np.bool_(True)})
    run.log({"n": {"x": 1, "deep": {"y": torch.tensor([2])}}, "small": np.arange(3), "_step": 99, "none": None})
    run.log({"nan": math.nan, "inf": -math.inf, "text": "é", "big": 2**70})
    run.finish()
    first, second, third = without_times(rows(run))
    assert first == {"_step": 0, "np": float(value), "int": 7, "torch": 0.25, "flag": True}
    assert [type(first[key]) for key in ("np", "int", "flag")] == [float, int, bool]
    assert second == {"_step": 1, "n.x": 1, "n.deep.y": 2, "small": [0, 1, 2], "none": None}
    assert math.isnan(third.pop("nan"))
    assert third == {"_step": 2, "inf": -math.inf, "text": "é", "big": float(2**70)}


@pytest.mark.parametrize(
    ("data", "step", "named"),
    [
        ({"a": object()}, None, '"a"'),
        ({1: 2}, None, "keys must be strings"),
        ([1], None, "dict of str"),
        ({"a": 1}, 1.5, "float"),
        ({"a": 1}, "3", "str"),
        ({"a": 1}, True, "bool"),
        ({"x": {"y": object()}}, 5, "x.y"),
    ],
)
def test_what_cannot_be_logged_changes_nothing(data: Any, step: Any, named: str) -> None:
    """Proves that a bad call is a TypeError naming the culprit, and leaves step, position and journal as they were."""
    run = wbdist.init(project="p")
    run.log({"a": 1.0}, step=2)
    before = run.position()
    with pytest.raises(TypeError, match=named):
        run.log(data, step=step)
    after = run.position()
    assert (after.watermark, after.summary) == (before.watermark, before.summary)
    run.log({"b": 1}, step=2)
    run.finish()
    assert without_times(rows(run)) == [{"_step": 2, "a": 1.0, "b": 1}]


def test_summary_follows_rows_and_hands() -> None:
    """Proves last values, manual sets, that a later log overwrites a manual set, and that None leaves the summary alone."""
    run = wbdist.init(project="p")
    run.log({"loss": 3.0, "acc": 0.1})
    run.log({"loss": 2.0, "note": "x"})
    run.log({"note": None})
    run.summary["best"] = np.float64(0.5)
    run.summary["loss"] = -1.0
    assert dict(run.summary.items()) == {"loss": -1.0, "acc": 0.1, "note": "x", "best": 0.5}
    run.log({"loss": 1.0})
    assert run.summary.loss == 1.0
    with pytest.raises(TypeError, match="bad"):
        run.summary["bad"] = object()


def test_position_counts_what_a_checkpoint_may_rely_on() -> None:
    """Proves that a position counts closed rows and printed lines of this writer, and leaves the pending row out."""
    run = wbdist.init(project="p")
    assert run.position().watermark.step == -1
    run.log({"a": 1}, step=4)
    run.log({"a": 2}, step=9)
    position = run.position()
    assert position.watermark.step == 4
    assert position.watermark.counts[HISTORY] == {"rank0": 1}
    run.commit_row()
    run.commit_row()
    print("one line")
    position = run.position()
    assert (position.watermark.step, position.watermark.counts[HISTORY]) == (9, {"rank0": 2})
    assert position.watermark.counts[CONSOLE] == {"rank0": 1}
    assert position.summary["a"] == 2
    assert msgspec.json.decode(msgspec.json.encode(position), type=RunPosition) == position


def test_a_run_continues_from_its_base() -> None:
    """Proves that step, summary and runtime go on from the base, so that the rows are those of a run never interrupted."""
    spec = make_spec(resolve(None, {"project": "p", "run_id": "same"}))
    with open_run(spec) as first:
        for i in range(5):
            first.log({"i": i})
        base = first.position()
        first.log({"i": 99})  # beyond the checkpoint
    later = msgspec.structs.replace(base, runtime=100.0)
    with open_run(msgspec.structs.replace(spec, attempt=2, base=later, cause="lost")) as second:
        assert (second.step, second.starting_step, second.resumed) == (5, 5, True)
        assert second.summary["i"] == 4
        second.log({"i": 5})
        assert second.position().runtime > 100.0
        assert second.position().watermark.attempt == 2
    (row,) = rows(second)
    assert (row["_step"], row["i"]) == (5, 5)
    assert row["_runtime"] >= 100.0
    assert second.position().watermark.counts[HISTORY] == {"rank0": 1}


def test_threads_lose_and_double_nothing() -> None:
    """Proves that rows of 8 threads all arrive, each once, in one order of steps."""
    run = wbdist.init(project="p")
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait(60)
        for i in range(200):
            run.log({"thread": thread, "i": i})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    run.finish()
    found = rows(run)
    assert [row["_step"] for row in found] == list(range(1600))
    for n in range(8):
        assert [row["i"] for row in found if row["thread"] == n] == list(range(200))


def test_nothing_is_taken_after_finish() -> None:
    """Proves that a finished run refuses rows and changes, naming the run; facts stay readable; finish is idempotent."""
    run = wbdist.init(project="p", id="gone", config={"lr": 1})
    run.log({"a": 1})
    run.finish(3)
    run.finish(0)
    for act in (
        lambda: run.log({"a": 2}),
        lambda: run.config.update({"x": 1}),
        lambda: run.summary.update({"x": 1}),
        run.mark_preempting,
        lambda: setattr(run, "name", "x"),
        run.commit_row,
    ):
        with pytest.raises(wbdist.ShutdownError, match="gone"):
            act()
    assert (run.step, run.summary["a"], run.config.lr) == (1, 1, 1)


def test_disk_full_is_said_by_log_and_heals(script: Callable[..., Any]) -> None:
    """Proves that a full disk raises DiskFullError from `log`, keeps all rows before it, and later takes rows again."""
    done = script(
        """
        import resource, signal, wbdist
        from wbdist.errors import DiskFullError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = wbdist.init(project="p")
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        kept = 0
        try:
            while True:
                run.log({"text": "x" * 5000, "i": kept})
                kept += 1
        except DiskFullError as error:
            assert "safe" in str(error), error
        assert run.step == kept, (run.step, kept)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        run.log({"i": kept})
        run.finish()
        from wbdist.run.journal import JournalReader, Kind
        reader = JournalReader.open(run.journal_path)
        steps = []
        while records := reader.read():
            steps += [r.step for r in records if r.kind is Kind.ROW]
        assert steps == list(range(kept + 1)), steps[-3:]
        print("kept", kept)
        """
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 50


def test_a_forked_child_is_told(script: Callable[..., Any]) -> None:
    """Proves that a forked child gets an error naming the run and the way out, and may open its own run."""
    done = script(
        """
        import os, sys, wbdist
        run = wbdist.init(project="p", id="parents")
        run.log({"a": 1})
        child = os.fork()
        if child == 0:
            assert wbdist.run is None
            for use in (lambda: run.log({"a": 2}), lambda: run.finish(), lambda: run.config.update({"k": 1})):
                try:
                    use()
                except wbdist.UsageError as error:
                    assert "parents" in str(error) and "forked child" in str(error), error
                else:
                    sys.exit("the child used its parent's run")
            with wbdist.init(project="p", id="childs") as own:
                own.log({"a": 3})
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        run.log({"a": 4})
        run.finish()
        """
    )
    assert done.returncode == 0, done.stderr
    ends = {path.parent.name.rpartition("-")[2]: _end(path) for path in sorted(_journals())}
    assert ends == {"parents": {"exit_code": 0, "cause": "exit"}, "childs": {"exit_code": 0, "cause": "exit"}}


def _journals() -> list[Any]:
    from wbdist.run.journal import find_journals

    return find_journals(f"{os.getcwd()}/wandb")  # noqa: PTH109


def _end(path: Any) -> Any:
    with JournalReader.open(path) as reader:
        while reader.read():
            continue
        return reader.ended


class _InterruptError(Exception):
    """What the signal handlers below raise."""


def _shaken(run: Run, handler: Callable[[], None], seconds: float) -> int:
    """Logs for `seconds` while a timer's signal runs `handler` wherever `log` is; how many calls were interrupted."""
    inside = Run.log.__code__
    interrupted = 0
    ours = str(Path(wbdist.__file__).parent)

    def on_signal(_number: int, frame: FrameType | None) -> None:
        if frame is not None and not frame.f_code.co_filename.startswith(ours):
            return None  # a collector's or the test runner's hook, called inside of `log`
        while frame is not None:
            if frame.f_code is inside:
                return handler()
            frame = frame.f_back
        return None

    previous = signal.signal(signal.SIGALRM, on_signal)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0003)
        end = time.monotonic() + seconds
        number = 0
        while time.monotonic() < end:
            try:
                number += 1
                run.log({"x": 0.5, "y": number} if number % 7 else {"other": float(number)})
            except _InterruptError:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return interrupted


def test_exceptions_out_of_signal_handlers_break_nothing() -> None:
    """Proves that a handler's exception (Ctrl-C) out of `log`, at any place, leaves a journal that reads to its end, with steps
    that count on and a position that agrees with it."""
    run = wbdist.init(project="p", settings={"console": "off"})

    def stop() -> None:
        raise _InterruptError

    interrupted = _shaken(run, stop, 0.8)
    position = run.position()
    run.finish()
    found = rows(run)
    assert interrupted > 20
    assert [row["_step"] for row in found] == list(range(len(found)))
    assert position.watermark.counts[HISTORY] == {"rank0": len(found)}
    assert run.journal_path is not None
    assert _end(run.journal_path) == {"exit_code": 0, "cause": "exit"}


def test_signal_handlers_may_log() -> None:
    """Proves that rows logged by a handler that interrupts `log` are kept, between the others, none lost and none twice."""
    run = wbdist.init(project="p", settings={"console": "off"})
    logged = 0

    def log_too() -> None:
        nonlocal logged
        logged += 1
        run.log({"handler": logged} if logged % 3 else {"x": -0.5, "y": logged})

    _shaken(run, log_too, 0.6)
    last = run.summary.get("handler")
    run.finish()
    found = rows(run)
    assert logged > 20
    assert [row["_step"] for row in found] == list(range(len(found)))
    # Sorted: a handler may itself be interrupted by the next signal.
    ours = [row["handler"] for row in found if "handler" in row]
    assert sorted(ours) == [n for n in range(1, logged + 1) if n % 3]
    assert sorted(row["y"] for row in found if row.get("x") == -0.5) == [n for n in range(1, logged + 1) if n % 3 == 0]
    assert last in ours


def test_a_handler_may_log_between_two_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a row which a handler logs just as `log` turns from one shape to another of the same length is not read as
    the other's: the summary has both."""
    run = wbdist.init(project="p", settings={"console": "off"})
    run.log({"float": 0.5})
    run.log({"count": 1})
    run.log({"float": 1.5})
    journal = run.journal
    assert isinstance(journal, JournalWriter)
    fold = journal._fold

    def interrupted() -> None:
        fold()
        monkeypatch.setattr(journal, "_fold", fold)
        run.log({"float": 2.5})

    monkeypatch.setattr(journal, "_fold", interrupted)
    run.log({"count": 2})
    assert (run.summary["float"], run.summary["count"]) == (2.5, 2)
    run.finish()
    assert [row.get("float", row.get("count")) for row in rows(run)] == [0.5, 1, 1.5, 2.5, 2]


def test_the_summary_knows_the_last_row_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the summary is that of the rows in the journal: across changes of shape, and after a row that did not fit."""
    run = wbdist.init(project="p", settings={"console": "off"})
    for number in range(5):
        run.log({"a": float(number), "n": number})
    assert run.summary.a == 4.0
    run.log({"b": 1.5})
    run.log({"a": 5.0, "n": 5})
    run.log({"a": 6.0, "n": 2**70})  # does not fit its place, and is written in full
    assert (run.summary.a, run.summary.n, run.summary.b) == (6.0, float(2**70), 1.5)
    run.log({"a": 7.0, "n": 7})
    monkeypatch.setattr(run.journal, "_write", refuse)
    monkeypatch.setattr(run.journal, "_make_room", _no_space)
    with pytest.raises(DiskFullError):
        run.log({"a": 8.0, "n": 8})
    assert (run.summary.a, run.summary.n, run.step) == (7.0, 7, 9)
    monkeypatch.undo()
    run.log({"a": 9.0, "n": 9})
    assert run.summary.a == 9.0
    run.finish()
    assert [row.get("a") for row in rows(run)] == [0.0, 1.0, 2.0, 3.0, 4.0, None, 5.0, 6.0, 7.0, 9.0]


def _no_space(_need: int) -> None:
    raise DiskFullError("no space")


def test_what_no_row_can_hold_is_refused_by_name_and_the_next_row_is_kept() -> None:
    """Proves that a dict that holds itself, an int beyond the floats, a tensor without values and a step beyond JSON's integers
    are errors that say what was given, and change nothing; they were a RecursionError, or rows that no server kept."""
    own: dict[str, Any] = {}
    own["a"] = own
    run = wbdist.init(project="p", settings={"quiet": True})
    for wrong, told in (
        (own, "holds itself"),
        ({"list": [own]}, '"list": it holds itself'),
        ({"big": 10**400}, '"big": an int of 1329 bits'),
        ({"meta": torch.tensor(1.0, device="meta")}, '"meta": '),
    ):
        with pytest.raises(TypeError, match=told):
            run.log(wrong)
    for step in (2**53, 2**70, np.uint64(2**63)):
        with pytest.raises(ValueError, match=rf"step={step} .* 9007199254740991"):
            run.log({"a": 1}, step=step)
    run.log({"a": np.longdouble(1.5)}, step=2**53 - 1)
    run.finish()
    assert without_times(rows(run)) == [{"_step": 2**53 - 1, "a": 1.5}]


def test_text_that_is_no_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that bytes which Python could not read (a file's name in EUC-KR among the arguments) reach keys, values, config,
    summary and the run's own files as text; `init` failed with them."""
    monkeypatch.setattr("sys.argv", ["train.py", "\udcc7\udcd1.csv"])
    run = wbdist.init(project="p", config={"file": "\udcff"}, settings={"quiet": True})
    run.log({"\udcfe": "\udcff", "한글": "값 💥"})
    run.summary["best"] = {"\udcff": "\udcff"}
    run.finish()
    assert without_times(rows(run)) == [{"_step": 0, "\\udcfe": "\\udcff", "한글": "값 💥"}]
    assert run.config.as_dict() == {"file": "\\udcff"}
    assert run.summary["best"] == {"\\udcff": "\\udcff"}
    assert "udcc7" in (Path(run.dir) / "wandb-metadata.json").read_text()


@pytest.mark.parametrize("wrong", [{"tokens": "avg"}, {"tokens": "p101"}, {"tokens": None}, {1: "sum"}, "sum", None])
def test_a_reduction_is_checked_where_it_is_asked_for(wrong: Any) -> None:
    """Proves that a word that no aggregator knows is refused, with those that are known, and not journalled: each aggregator
    that read it died of it, and with it the history of all ranks."""
    run = wbdist.init(project="p", settings={"quiet": True})
    with pytest.raises(wbdist.UsageError, match="sum"):
        run.define_reduction(wrong)
    run.log({"tokens": 1})
    run.finish()
    assert without_times(rows(run)) == [{"_step": 0, "tokens": 1}]
    with JournalReader.open(Path(str(run.journal_path))) as reader:
        assert not [record for record in reader.read() if record.kind is Kind.DEFINE]
