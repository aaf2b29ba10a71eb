"""Offline jobs: what the server has in the end does not depend on the order in which journals arrive, nor on how often."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Machine, comparable, the_run
from support.journals import read_all
from support.serving import Server
from support.waiting import until

from wbdist.checkpoint.manifest import committed
from wbdist.distributed.cut import PositionCursor
from wbdist.run.journal import JournalReader, Kind, find_journals
from wbdist.run.journal_copy import journal_prefix
from wbdist.run.shipper.oneshot import ship
from wbdist.run.shipper.remote import Remote

KILLS = (5, 10)


def job_with_kills(machine: Machine, name: str, directory: Path, kills: tuple[int, ...], strategy: str) -> None:
    args = ("--name", name, "--checkpoint-dir", str(directory), "--strategy", strategy, "--samples", "40")
    for step in kills:
        machine.jobs.start(*args, "--step-seconds", "0.1")
        until(lambda step=step: any(m.step >= step for m in committed(directory)), f"a checkpoint at or after step {step}")
        machine.end()
    job = machine.jobs.start(*args)
    assert job.wait() == 0, job.output()


def journals_of(machine: Machine) -> list[Path]:
    found = []
    for path in find_journals(machine.disk / "wandb"):
        with JournalReader.open(path) as reader:
            if reader.header.role == "run":
                found.append(path)
    return found


def up_to_some_row(journal: Path, chance: random.Random) -> bytes:
    """The journal as it was when one of its rows had just been closed. (Cut within a row it would be that of a writer which
    died there, and the rest of the row would come too late.)"""
    steps = [row.step for row in rows_of(journal)]
    cursor = PositionCursor([journal])
    cursor.position(chance.choice(steps))
    [(path, frame)] = cursor.cut()
    cursor.close()
    return path.read_bytes()[: journal_prefix(path, frame).size]


def rows_of(journal: Path) -> list[Any]:
    return [record for record in read_all(journal) if record.kind is Kind.ROW and record.step is not None]


def arrivals(journals: list[Path], chance: random.Random, scratch: Path) -> list[Path]:
    """Every journal at least once, some cut short before, some again; one of them only at the very end."""
    late = chance.choice(journals)
    out: list[Path] = []
    for journal in journals:
        if journal == late:
            continue
        for _ in range(chance.randint(1, 3)):
            out.append(journal)
        part = scratch / f"{chance.getrandbits(40):x}" / journal.name
        part.parent.mkdir(parents=True)
        part.write_bytes(up_to_some_row(journal, chance))
        out.append(part)
    chance.shuffle(out)
    return [*out, late, chance.choice(out)]


def arrive(server: Server, journals: list[Path]) -> None:
    for journal in journals:
        for result in ship([journal], lambda _: Remote(server.url, server.key), 30.0, logging.getLogger("test")):
            assert result.outcome in {"complete", "fenced"}, result


def state(run: Any) -> dict[str, Any]:
    summary = {key: value for key, value in run.summary.items() if key not in {"_timestamp", "_runtime", "_wandb"}}
    return {
        "history": comparable(run),
        "summary": summary,
        "config": run.config,
        "state": run.state,
        "attempts": [(a.attempt, a.rows, a.rows_live, a.base_attempt, a.base_step, a.cause, a.end) for a in run.attempts()],
        "archive": [[row["_step"] for row in run.scan_history(attempt=a.attempt)] for a in run.attempts()],
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["rank0", "per_rank"])
def test_order_and_repetition_do_not_matter(
    tmp_path: Path, machines: Any, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Proves it with real jobs of two ranks, killed twice: journals arrive in random order, some first in part, some
    again, and one only after all others; every server ends in the same state, that of a job never interrupted."""
    with monkeypatch.context() as offline:
        offline.setenv("WANDB_MODE", "offline")
        killed, whole = machines("killed"), machines("whole")
        job_with_kills(killed, "tested", tmp_path / "ckpt", KILLS, strategy)
        job_with_kills(whole, "reference", tmp_path / "reference-ckpt", (), strategy)
    journals = journals_of(killed)
    assert len(journals) == (len(KILLS) + 1) * (2 if strategy == "per_rank" else 1)
    names = ["tested-rank0", "tested-rank1"] if strategy == "per_rank" else ["tested"]

    states = []
    for seed in range(3):
        server = Server(tmp_path / f"server-{seed}")
        server.start()
        try:
            monkeypatch.setenv("WANDB_BASE_URL", server.url)
            monkeypatch.setenv("WANDB_API_KEY", server.key)
            order = journals if seed == 0 else arrivals(journals, random.Random(seed), tmp_path / "parts")
            arrive(server, [*order, *journals_of(whole)])
            states.append({name: state(the_run(name)) for name in names})
            if seed == 0:
                for name in names:
                    untouched = the_run(name.replace("tested", "reference"))
                    assert states[0][name]["history"] == comparable(untouched)
                    assert states[0][name]["state"] == "finished"
        finally:
            server.stop()
        for name in names:
            for what, value in states[-1][name].items():
                assert value == states[0][name][what], f"seed {seed}, {name}: {what}"
