"""What is left of a trial (see `faults`): read back through the API and compared with the job that nobody killed."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from support.journals import assembled
from support.plans import Plan
from support.trial import PATIENCE, PROJECT, PYTHON, Trial

import wbdist
from wbdist.errors import JournalCorruptError
from wbdist.run.journal import JournalHeader, JournalReader, find_journals
from wbdist.run.remote_run import RunRecord

Row = tuple[tuple[str, str], ...]
"""A row without wall-clock columns; repr shows every bit and tells 1 from 1.0."""
CLOCKS = {"_timestamp", "_runtime"}
_PRINTED = re.compile(r"at step \d+$")


class Seen(msgspec.Struct):
    """One run as the server shows it."""

    rows: list[Row]
    weights: str
    console: list[str]
    """What the script printed, in order; what wbdist printed about attempts is left out."""


class Kept(msgspec.Struct):
    """One run's journal on disk."""

    path: Path
    header: JournalHeader
    rows: list[Row]
    end: dict[str, Any] | None


def comparable(row: dict[str, Any]) -> Row:
    return tuple(sorted((key, repr(value)) for key, value in row.items() if key not in CLOCKS))


def step_of(row: Row) -> int:
    return int(dict(row)["_step"])


def api_of(trial: Trial) -> wbdist.Api:
    return wbdist.Api({"base_url": trial.server.url}, api_key=trial.server.key)


def runs_of(api: wbdist.Api, plan: Plan) -> dict[int, RunRecord]:
    """rank -> its run under per_rank, else 0 -> the one run."""
    found = list(api.runs(PROJECT))
    if plan.strategy == "per_rank":
        return {run.config["rank"]: run for run in found}
    return dict(enumerate(found))


def console_of(run: RunRecord) -> list[str]:
    return [found[0] for line in run.console_logs() if (found := _PRINTED.search(line.content))]


def see(api: wbdist.Api, plan: Plan) -> dict[int, Seen]:
    return {
        number: Seen([comparable(row) for row in run.scan_history()], str(run.summary.get("weights")), console_of(run))
        for number, run in runs_of(api, plan).items()
    }


def kept_journals(directory: Path, role: str = "run") -> list[Kept]:
    """Read as the shipper reads them: the open row of a lost writer is closed. By attempt, then writer."""
    found = []
    for path in find_journals(directory / "wandb"):
        try:
            reader = JournalReader.open(path)
        except JournalCorruptError:  # its writer was killed before the header was whole: it never was a journal
            continue
        with reader:
            if reader.header.role != role:
                continue
            header = reader.header
            closed, unfinished = assembled(reader)
            found.append(Kept(path, header, [comparable(row) for row in closed + unfinished], reader.ended))
    return sorted(found, key=lambda kept: (kept.header.run_id, kept.header.attempt, kept.header.writer))


def verify(trial: Trial, reference: dict[int, Seen]) -> None:
    """Raises FaultError unless nobody could tell that anything had happened. Brings offline journals to the server first."""
    _no_orphans(trial)
    if trial.plan.mode == "offline":
        trial.server.start()
        _sync_in_any_order(trial)
    else:
        _delivered(trial)
    if trial.plan.strategy == "rank0" and trial.plan.world_size > 1:
        _sync(trial, trial.directory / "wandb")  # what ranks logged last that were killed with their aggregator
    api = api_of(trial)
    _like_the_reference(trial, see(api, trial.plan), reference)
    _nothing_lost(trial, api)
    _promises_kept(trial)
    before = _dump(api, trial.plan)
    _sync(trial, trial.directory / "wandb")
    if _dump(api, trial.plan) != before:
        raise trial.fail("syncing once more changed what the server shows")


def _no_orphans(trial: Trial) -> None:
    if not _within(5.5, lambda: not trial.survivors()):
        raise trial.fail(f"5 s after the end these processes still live: {trial.survivors()}")


def _delivered(trial: Trial) -> None:
    """The shipper brings everything and leaves by itself; only where a blow or an aim killed the last one, after which nobody
    is left to start another, may `wbdist sync` be needed."""
    if not _within(40.0, lambda: not trial.family().shippers):
        raise trial.fail(f"40 s after the end a shipper is still there: {_shipper_log(trial)}")
    kept = kept_journals(trial.directory)
    # A replay is made beside the job, and is cut off with it.
    ours = [one for one in kept if not one.header.writer.startswith("rank0.replay")]
    unsent = [str(one.path) for one in ours if not one.path.with_name(one.path.name + ".shipped").exists()]
    late = [blow for blow in trial.plan.blows[-2:] if blow.target in {"shipper", "all", "some"}]
    begun = re.findall(r"shipper (\d+) of .* begins", _shipper_log(trial))
    last_was_shot = bool(begun) and any(hit.startswith(f"shipper {begun[-1]} ") for hit in trial.hits())
    if unsent and not late and not last_was_shot and not trial.sync_needed:
        raise trial.fail(f"the shipper left without having sent {unsent}: {_shipper_log(trial)}")
    if unsent:
        _sync(trial, trial.directory / "wandb")


def _shipper_log(trial: Trial) -> str:
    path = trial.directory / "wandb" / "logs" / "shipper.log"
    return path.read_text(errors="replace")[-3000:] if path.exists() else "no log"


def _sync(trial: Trial, path: Path) -> None:
    environment = {**trial.environment, "WANDB_BASE_URL": trial.server.url, "WANDB_API_KEY": trial.server.key}
    command = [PYTHON, "-m", "wbdist", "sync", "--base-url", trial.server.url, str(path)]
    done = subprocess.run(
        command, cwd=trial.directory, env=environment, capture_output=True, text=True, timeout=120 * PATIENCE, check=False
    )
    if done.returncode != 0:
        raise trial.fail(f"wbdist sync ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _sync_in_any_order(trial: Trial) -> None:
    """Some journals alone and in any order, one of them twice; then all."""
    paths = [kept.path for kept in kept_journals(trial.directory)]
    rng = random.Random(trial.plan.seed)
    for path in rng.sample(paths, min(3, len(paths))):
        _sync(trial, path)
    _sync(trial, rng.choice(paths))
    _sync(trial, trial.directory / "wandb")


def _like_the_reference(trial: Trial, seen: dict[int, Seen], reference: dict[int, Seen]) -> None:
    if seen.keys() != reference.keys():
        raise trial.fail(f"the server has runs {sorted(seen)}, it should have {sorted(reference)}")
    for number, was in reference.items():
        run = seen[number]
        steps = Counter(step_of(row) for row in run.rows)
        expected = {step_of(row): row for row in was.rows}
        doubled = [step for step, count in steps.items() if count > 1]
        missing = [step for step in expected if step not in steps]
        stale = [step for step in steps if step not in expected]
        wrong = [row for row in run.rows if row != expected.get(step_of(row))]
        if doubled or missing or stale or wrong:
            first = wrong[0] if wrong else ()
            raise trial.fail(
                f"run {number}: steps doubled {doubled}, missing {missing}, stale {stale}, {len(wrong)} rows differ, first:\n"
                f"{first}\n{expected.get(step_of(first)) if first else ''}"
            )
        if run.rows != was.rows:
            raise trial.fail(f"run {number}: the rows are right but in another order: {[step_of(row) for row in run.rows]}")
        if run.weights != was.weights:
            raise trial.fail(f"run {number}: other final weights:\n{run.weights}\n{was.weights}")
        if run.console != was.console:
            lines, should = Counter(run.console), Counter(was.console)
            raise trial.fail(f"run {number}: console lines too many {dict(lines - should)}, missing {dict(should - lines)}")


def _nothing_lost(trial: Trial, api: wbdist.Api) -> None:
    """Archive + live = the journals; states and attempts are what happened."""
    journals = kept_journals(trial.directory)
    for number, run in runs_of(api, trial.plan).items():
        if run.state != "finished":
            raise trial.fail(f"run {number} is {run.state}, not finished")
        attempts = {attempt.attempt: attempt for attempt in run.attempts()}
        own = [kept for kept in journals if kept.header.run_id == run.id]
        if sorted(attempts) != sorted({kept.header.attempt for kept in own}):
            raise trial.fail(f"run {number}: attempts {sorted(attempts)}, journals of {[kept.header.attempt for kept in own]}")
        newest = max(attempts)
        for at, attempt in attempts.items():
            written = [kept for kept in own if kept.header.attempt == at]
            rows = [row for kept in written for row in kept.rows]
            if attempt.rows != len(rows):
                raise trial.fail(f"run {number} attempt {at}: the server has {attempt.rows} rows, the journals {len(rows)}")
            # Read as that attempt saw it: what it was built upon, then its own rows.
            viewed = [row for raw in run.scan_history(attempt=at) if step_of(row := comparable(raw)) > attempt.base_step]
            if viewed != rows:
                raise trial.fail(f"run {number} attempt {at}: the archive differs from the journals: {viewed} {rows}")
            base = max((kept.header.base.step for kept in written if kept.header.base), default=-1)
            if attempt.base_step != base:
                raise trial.fail(f"run {number} attempt {at}: built on step {attempt.base_step}, the journal says {base}")
            # Of an aggregator's that was killed behind its end: the one that was started for it wrote nothing.
            end = next((kept.end for kept in reversed(written) if kept.end is not None), None)
            if not attempt.cause or attempt.ended_at is None:
                raise trial.fail(f"run {number} attempt {at}: cause {attempt.cause!r}, ended at {attempt.ended_at}")
            told = (attempt.end_cause, attempt.exit_code)
            allowed = (
                [("lost", None), ("superseded", None)]
                if end is None
                else [(end["cause"], end["exit_code"]), ("superseded", None)]
            )
            if at == newest:
                allowed = [("exit", 0)]
            if told not in allowed:
                raise trial.fail(f"run {number} attempt {at}: ended as {told}, the journal's end is {end}")


def _promises_kept(trial: Trial) -> None:
    """Every row whose `log` returned is in its rank's journal."""
    shared = trial.plan.strategy == "rank0" and trial.plan.world_size > 1
    held: set[tuple[int, int, int]] = set()
    for kept in kept_journals(trial.directory, "feed" if shared else "run"):
        held |= {(kept.header.rank, kept.header.attempt, step_of(row)) for row in kept.rows}
    for rank in range(trial.plan.world_size):
        path = trial.acks / f"acks-{rank}"
        for line in path.read_text().splitlines() if path.exists() else []:
            attempt, step = map(int, line.split())
            if (rank, attempt, step) not in held:
                raise trial.fail(f"rank {rank} was promised its row of step {step} in attempt {attempt}; no journal has it")
    if not shared:
        return
    merged = {(kept.header.attempt, step_of(row)) for kept in kept_journals(trial.directory) for row in kept.rows}
    if missing := {(attempt, step) for _, attempt, step in held} - merged:
        raise trial.fail(f"these steps of (attempt, step) are in feeds and not in the run: {sorted(missing)}")


def _dump(api: wbdist.Api, plan: Plan) -> Any:
    """All that could change."""
    return {
        number: (
            [sorted((key, repr(value)) for key, value in row.items()) for row in run.scan_history()],
            run.state,
            run.summary,
            [msgspec.structs.replace(attempt, ended_at=None) for attempt in run.attempts()],
            console_of(run),
        )
        for number, run in runs_of(api, plan).items()
    }


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds * PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
