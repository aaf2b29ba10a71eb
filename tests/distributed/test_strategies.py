"""Strategies besides rank0's aggregation: who writes what, what all ranks agree on, and what stops nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from distributed.programs.file_coordinator import FileCoordinator
from support.feeding import REPOSITORY, Ranks
from support.journals import records_of, rows_of
from support.lingering import kill_all, processes_of

import wbdist
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.opening import lead
from wbdist.distributed.own_runs import silent_spec
from wbdist.distributed.strategies import choose
from wbdist.run.init import make_spec
from wbdist.run.journal import JournalReader, Kind
from wbdist.run.lifecycle import RunSpec, open_run
from wbdist.settings import resolve

OURS = {"PYTHONPATH": str(REPOSITORY)}
FOUR = RankIdentity(rank=1, world_size=4, local_rank=1, local_world_size=4, source="torchrun", reason="RANK=1, WORLD_SIZE=4")


@pytest.mark.parametrize(
    ("strategy", "identity", "mode", "chosen", "why"),
    [
        ("auto", FOUR, "online", "rank0", "4 ranks (torchrun: RANK=1, WORLD_SIZE=4)"),
        ("auto", FOUR, "shared", "shared", 'mode="shared"'),
        ("auto", RankIdentity(), "online", "plain", "alone"),
        ("rank_zero_only", FOUR, "online", "rank_zero_only", "asked for"),
        ("rank0", RankIdentity(), "offline", "plain", "alone"),
        ("per_rank", RankIdentity(), "offline", "per_rank", "asked for"),
        ("rank0", FOUR, "disabled", "plain", "disabled"),
    ],
)
def test_choice_and_its_reason(strategy: str, identity: RankIdentity, mode: str, chosen: str, why: str) -> None:
    """Proves which strategy is meant, and that a person can read why."""
    found, reason = choose(strategy, identity, mode)
    assert (found, why in reason) == (chosen, True), reason


def test_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(wbdist.UsageError, match="auto, rank0, per_rank, shared, rank_zero_only"):
        choose("mean", FOUR, "online")


def test_shared_run_of_many_writers(ranks: Ranks) -> None:
    """Proves that under shared every rank writes the one run with its own steps, that rank 0 says what it is and when it ends,
    and that the position at a step counts every writer's rows and is the same on all ranks."""
    ranks.start(3, strategy="shared", steps=20, drain=9, config0={"lr": 0.7})
    assert ranks.wait() == [0, 0, 0], ranks.errors()
    journals = ranks.journals()
    assert len(journals) == 3
    for rank, path in enumerate(journals):
        with JournalReader.open(path) as reader:
            header = reader.header
        assert (header.run_id, header.writer, header.nonce, header.primary) == ("job", f"rank{rank}", "shared-n", rank == 0)
        assert [row["_step"] for row in rows_of(path)] == list(range(20))
        assert rows_of(path)[3]["who"] == rank
        assert records_of(path, Kind.END)[0]["exit_code"] == (0 if rank == 0 else None)
    positions = [event["position"] for event in ranks.events("drained")]
    assert positions == [positions[0]] * 3
    assert positions[0]["watermark"]["counts"]["wandb-history.jsonl"] == {"rank0": 10, "rank1": 10, "rank2": 10}
    assert {event["lr"] for event in ranks.events("open")} == {0.7}, "rank 0's config is every rank's"


def test_rank_zero_only_checks_on_every_rank(ranks: Ranks) -> None:
    """Proves that only rank 0 writes, that the others refuse what rank 0 refuses, and that all have rank 0's position."""
    ranks.start(2, strategy="rank_zero_only", steps=20, drain=9, junk=True, config0={"lr": 0.7})
    assert ranks.wait() == [0, 0], ranks.errors()
    (journal,) = ranks.journals()
    assert [row["who"] for row in rows_of(journal)] == [0] * 20
    positions = [event["position"] for event in ranks.events("drained")]
    assert positions == [positions[0]] * 2
    assert positions[0]["watermark"]["counts"]["wandb-history.jsonl"] == {"rank0": 10}
    refusals = {rank: [event["error"] for event in ranks.events("junk") if event["rank"] == rank] for rank in (0, 1)}
    assert refusals[0] == refusals[1]
    assert len(refusals[0]) == 5
    assert {event["lr"] for event in ranks.events("open")} == {0.7}


@pytest.mark.parametrize("strategy", ["per_rank", "shared"])
def test_one_ranks_refusal_is_everybodys(ranks: Ranks, strategy: str) -> None:
    """Proves that when one rank cannot open its run all ranks hear why, and no run stays open."""
    ranks.start(2, strategy=strategy, steps=5, refuse=[1])
    assert ranks.wait() == [0, 0], ranks.errors()
    events = ranks.events("refused")
    assert [event["error"] for event in events] == ["rank 1 could not open its run: this rank is refused"] * 2
    assert [event["open"] for event in events] == [0, 0]


def test_aggregator_that_does_not_come_up_stops_nobody(ranks: Ranks) -> None:
    """Proves that ranks log although there is no aggregator, and that one which comes up later has every row."""
    ranks.start(2, strategy="rank0", steps=60, no_aggregator=True, drain=59)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert [row["_step"] for row in ranks.rows()] == list(range(60))
    assert ranks.rows()[5]["count"] == 3
    assert ranks.errors().count("training goes on") == 1


@pytest.fixture
def shippers(tmp_path: Path) -> Iterator[None]:
    yield
    kill_all(processes_of(tmp_path))


@pytest.mark.usefixtures("shippers")
@pytest.mark.parametrize("strategy", ["shared", "rank0"])
def test_server_away_is_one_line_and_stops_nobody(ranks: Ranks, strategy: str) -> None:
    """Proves that without the server all ranks go on with their journals alone, which is said once and not by every rank."""
    away = {"mode": "online", "base_url": "http://127.0.0.1:9", "api_key": "k" * 40, "finish_timeout": 0.1}
    ranks.start(2, strategy=strategy, steps=10, settings=away)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert ranks.errors().count("training goes on") == 1, ranks.errors()
    assert [[row["_step"] for row in rows_of(path)] for path in ranks.journals()] == [list(range(10))] * len(ranks.journals())


def test_only_rank0_asks_a_server_that_is_away(tmp_path: Path) -> None:
    """Proves what the other ranks open from: rank 0's config, a server that is not asked again, and no line of their own."""
    settings = resolve({"mode": "online", "base_url": "http://127.0.0.1:9", "root_dir": str(tmp_path), "silent": True})
    asked: dict[int, RunSpec] = {}

    def opening_as(rank: int) -> None:
        def open_it(spec: RunSpec) -> wbdist.Run:
            asked[rank] = spec
            return open_run(silent_spec(msgspec.structs.replace(spec, writer=f"rank{rank}")))

        spec = make_spec(settings, config={"lr": 0.7, "only": 0} if rank == 0 else {"lr": 0.5, "more": rank})
        lead(FileCoordinator(tmp_path / "keys", rank, 2), "open", spec, open_it).finish()

    (tmp_path / "keys").mkdir()
    other = threading.Thread(target=opening_as, args=(1,))
    other.start()
    opening_as(0)
    other.join(60)
    assert [(spec.away, spec.announce) for _, spec in sorted(asked.items())] == [(False, True), (True, False)]
    assert asked[1].config == {"lr": 0.7, "only": 0, "more": 1}


@pytest.mark.slow
def test_shared_job_goes_on_from_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Ranks, shippers: None
) -> None:
    """Proves that the next attempt of a shared run shows all writers' rows up to the checkpoint and then its own, however the
    journals arrive: what attempt 1 logged beyond it is archived, the summary is of what is shown."""
    del shippers
    ranks.start(2, strategy="shared", steps=20, drain=9)
    assert ranks.wait() == [0, 0], ranks.errors()
    position: Any = ranks.events("drained")[0]["position"]
    again = Ranks(tmp_path / "again")
    again.start(2, strategy="shared", steps=5, base=position, attempt=2)
    assert again.wait() == [0, 0], again.errors()
    monkeypatch.setenv("WBDIST_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for path in (again.journals()[1], ranks.journals()[0], again.journals()[0], ranks.journals()[1]):
        subprocess.run([sys.executable, "-m", "wbdist", "sync", str(path)], env=OURS | dict(os.environ), check=True, timeout=60)
    run = wbdist.Api().run("p/job")
    shown = [(row["_step"], row["who"]) for row in run.scan_history()]
    assert sorted(shown) == [(step, rank) for step in range(15) for rank in (0, 1)]
    assert [step for step, _ in shown] == sorted(step for step, _ in shown)
    assert run.summary["step_again"] == 14
    assert (run.state, run.config["lr"]) == ("finished", 0.5)
