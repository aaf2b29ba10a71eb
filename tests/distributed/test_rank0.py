"""Strategy rank0 with real processes: exact reduction, and no loss or hang when any of them is killed."""

from __future__ import annotations

import math
import re
import signal
from typing import Any

import pytest
from support.feeding import Ranks
from support.journals import records_of, rows_of
from support.waiting import until

from wbdist.run.journal import JournalReader, Kind, find_journals


def expected(steps: range, ranks: range) -> list[dict[str, Any]]:
    """What the rows of programs/rank.py become."""
    rows = []
    for step in steps:
        losses = [0.1 * step + rank for rank in ranks]
        row: dict[str, Any] = {
            "loss": math.fsum(losses) / len(losses),
            "step_again": float(step),
            "count": sum(rank + 1 for rank in ranks),
        }
        row |= {"lo": min(ranks), "hi": max(ranks)} | {f"who/rank{rank}": rank for rank in ranks}
        rows.append(row | {"_step": step})
    return rows


@pytest.mark.parametrize("size", [2, 4])
def test_one_run_of_all_ranks(ranks: Ranks, size: int) -> None:
    """Proves that N ranks make one run: every step once, in order, reduced as asked, with rank 0's config and summary, and
    the same position on every rank."""
    ranks.start(size, strategy="rank0", steps=50, drain=49)
    assert ranks.wait() == [0] * size, ranks.errors()
    assert ranks.rows() == expected(range(50), range(size))
    (journal,) = ranks.journals()
    with JournalReader.open(journal) as reader:
        assert (reader.header.run_id, reader.header.writer, reader.header.attempt) == ("job", "rank0", 1)
    assert records_of(journal, Kind.CONFIG)[-1] == {"set": {"lr": 0.5}}
    assert {"set": {"weights": "abc"}} in records_of(journal, Kind.SUMMARY)
    assert records_of(journal, Kind.END) == [{"exit_code": 0, "cause": "exit"}]
    positions = [event["position"] for event in ranks.events("drained")]
    assert all(position == positions[0] for position in positions)
    assert positions[0]["watermark"] == {
        "attempt": 1,
        "counts": {"wandb-history.jsonl": {"rank0": 50}, "output.log": {"rank0": 0}},
        "step": 49,
    }
    assert positions[0]["summary"]["count"] == sum(range(1, size + 1))


def test_operations_are_said_once_and_hold_for_new_nested_keys(ranks: Ranks) -> None:
    """Proves that what a call asks for is journalled when it is new and not at each step, that a key which joins a nested dict
    later is reduced as it was asked for, too, and that what is no operation is refused by its name."""
    ranks.start(2, strategy="rank0", steps=4, nested=True, junk=True)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert [(row["val.a"], row.get("val.b")) for row in ranks.rows()] == [(2, None)] + [(2, 2)] * 3
    (feed,) = (path for path in find_journals(ranks.root / "wandb") if path.name.startswith("feed1"))
    assert [record["reduce"] for record in records_of(feed, Kind.DEFINE)] == [
        {"count": "sum"},
        {"lo": "min", "hi": "max", "who": "per_rank"},
        {"val.a": "sum"},
        {"val.b": "sum"},
    ]
    refused = [event["error"] for event in ranks.events("junk") if event["rank"] == 0]
    for name, error in zip(("reduce='median'", "reduce=['sum'] for 'x'", "reduce=None"), refused[2:], strict=True):
        assert error.startswith(f"{name} is not known; choose one of"), error


def test_skew_blocks_nobody_and_changes_nothing(ranks: Ranks) -> None:
    """Proves that a rank which is far ahead neither waits nor spoils the rows, and that a rank which logs nothing does not
    hold the others' rows back."""
    ranks.start(3, strategy="rank0", steps=400, gate={"1": 100}, silent=[2])
    ranks.until("gate", 1)
    journal = ranks.journals()[0]
    # Rank 0 wrote all its rows, rank 2 said that it adds nothing; only rank 1 keeps steps from 100 on open.
    until(lambda: len(rows_of(journal)) == 100, "the rows below the slow rank's step")
    assert not ranks.events("finished") or 1 not in {event["rank"] for event in ranks.events("finished")}
    ranks.open_gate()
    assert ranks.wait() == [0, 0, 0], ranks.errors()
    assert ranks.rows() == expected(range(400), range(2))


def test_position_is_of_the_step_not_of_the_moment(ranks: Ranks) -> None:
    """Proves that drain(step) answers for `step` although all ranks have logged further."""
    ranks.start(2, strategy="rank0", steps=30, drain=9)
    assert ranks.wait() == [0, 0], ranks.errors()
    drained = ranks.events("drained")
    assert len(drained) == 2
    for event in drained:
        assert event["position"]["watermark"]["counts"]["wandb-history.jsonl"] == {"rank0": 10}
        assert event["position"]["watermark"]["step"] == 9
        assert event["position"]["summary"]["_step"] == 9


def test_printed_lines_keep_their_place_between_the_rows(ranks: Ranks) -> None:
    """Proves that a position's console lines are those printed up to its step, however far rank 0 is ahead of the others: a
    job that goes on from there prints the rest again, and no line stands twice."""
    ranks.start(2, strategy="rank0", steps=30, prints=True, gate={"1": 5}, drain=9)
    until(lambda: "at step 29" in (ranks.root / "rank0.out").read_text(), "rank 0 to be far ahead")
    ranks.open_gate()
    assert ranks.wait() == [0, 0], ranks.errors()
    count = ranks.events("drained")[0]["position"]["watermark"]["counts"]["output.log"]["rank0"]
    (journal,) = ranks.journals()
    texts = [record["text"] for record in records_of(journal, Kind.CONSOLE)]
    assert [text for text in texts[:count] if text.startswith("at step")] == [f"at step {step}" for step in range(10)]
    assert [text for text in texts[count:] if text.startswith("at step")] == [f"at step {step}" for step in range(10, 30)]


def test_what_other_ranks_print_alert_and_show(ranks: Ranks) -> None:
    """Proves that every rank's printed lines are in the run, labelled and in one order whatever the timing; that an alert of
    several ranks at one step is one; that media of any rank are there, and its other files are not; and that a successor of a
    killed aggregator repeats nothing of it."""
    orders = {"alerts": {"1": 3, "2": 3}, "pages": {"0": 4, "2": 5}, "prints": True}
    ranks.start(3, strategy="rank0", steps=20, gate={"0": 10, "1": 12, "2": 16}, drain=14, **orders)
    ranks.until("gate", 3)
    until(lambda: len(ranks.rows()) == 10, "the rows before the gate")
    _running_aggregator(ranks).kill()
    until(lambda: len(ranks.journals()) == 2, "the successor's journal")
    ranks.open_gate()
    assert ranks.wait() == [0, 0, 0], ranks.errors()

    def said(kind: Kind) -> list[dict[str, Any]]:
        return [record for path in ranks.journals() for record in records_of(path, kind)]

    lines = [line["text"] for line in said(Kind.CONSOLE) if "at step" in line["text"]]
    assert lines == [f"{label}at step {step}" for step in range(20) for label in ("", "[rank1] ", "[rank2] ")]
    assert [(alert["title"], alert["text"]) for alert in said(Kind.ALERT)] == [("odd", "[rank1] seen by 1")]
    names = {file["name"].partition("_")[0] for file in said(Kind.FILE)}
    assert {"media/html/page0", "media/html/page2", "notes0"} <= names
    assert "notes2" not in names
    rows = ranks.rows()
    assert rows[4]["page0"]["_type"] == rows[5]["page2"]["_type"] == "html-file"


def test_continues_from_a_position(ranks: Ranks) -> None:
    """Proves that a new attempt opened at a position starts behind its step, and carries its summary."""
    base = {
        "run_id": "job",
        "project": "p",
        "entity": "",
        "watermark": {"attempt": 1, "counts": {"wandb-history.jsonl": {"rank0": 10}}, "step": 9},
        "summary": {"old": 1},
        "runtime": 5.0,
    }
    ranks.start(2, strategy="rank0", steps=5, drain=14, base=base, attempt=2)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert [row["_step"] for row in ranks.rows()] == list(range(10, 15))
    position = ranks.events("drained")[0]["position"]
    assert position["watermark"]["attempt"] == 2
    assert position["watermark"]["counts"]["wandb-history.jsonl"] == {"rank0": 5}
    assert position["summary"]["old"] == 1
    assert position["runtime"] > 5.0


def test_killed_producer_loses_nothing_and_holds_up_nobody(ranks: Ranks) -> None:
    """Proves that a SIGKILLed rank's rows are all there, that the others' go on without it, and that drain names it."""
    ranks.start(3, strategy="rank0", steps=200, kill_self={"1": 120}, drain=199)
    codes = ranks.wait()
    assert codes == [0, -signal.SIGKILL, 0], ranks.errors()
    assert ranks.rows() == expected(range(120), range(3)) + _without_rank1(range(120, 200))
    drained = ranks.events("drained")
    assert len(drained) == 2
    for event in drained:
        assert event["error"].startswith("PeerLostError: rank 1 died before step 199")
    assert records_of(ranks.journals()[0], Kind.END)[0]["exit_code"] == 70, "a run that lost a rank did not succeed"


def _without_rank1(steps: range) -> list[dict[str, Any]]:
    rows = []
    for step in steps:
        row: dict[str, Any] = {
            "loss": math.fsum([0.1 * step, 0.1 * step + 2]) / 2,
            "step_again": float(step),
            "count": 4,
            "lo": 0,
            "hi": 2,
        }
        rows.append(row | {"who/rank0": 0, "who/rank2": 2, "_step": step})
    return rows


def test_killed_rank0_ends_the_aggregator_without_an_end(ranks: Ranks) -> None:
    """Proves that the aggregator ends soon after rank 0 was killed, keeps every row, and leaves no END, so that the shipper
    reports the run lost."""
    ranks.start(2, strategy="rank0", steps=100, kill_self={"0": 60})
    ranks.until("open", 2)
    aggregator = ranks.aggregator()
    assert ranks.wait()[0] == -signal.SIGKILL
    aggregator.wait(60)
    (journal,) = ranks.journals()
    assert records_of(journal, Kind.END) == []
    assert rows_of(journal)[:60] == expected(range(60), range(2))


@pytest.mark.parametrize("times", [1, 2])
def test_killed_aggregator_loses_nothing(ranks: Ranks, times: int) -> None:
    """Proves that after a SIGKILL of the aggregator its successor, a new writer of the same attempt, continues the run with 0
    rows lost and 0 doubled, and that the position counts both writers' rows."""
    ranks.start(2, strategy="rank0", steps=300, gate={"0": 150, "1": 155}, drain=299)
    ranks.until("gate", 2)
    for number in range(times):
        if number == 0:
            until(lambda: len(ranks.rows()) == 150, "the rows before the gate")
        _running_aggregator(ranks).kill()
        until(lambda count=number + 2: len(ranks.journals()) == count, "the successor's journal")
    ranks.open_gate()
    assert ranks.wait() == [0, 0], ranks.errors()
    assert ranks.rows() == expected(range(300), range(2))
    counts = ranks.events("drained")[0]["position"]["watermark"]["counts"]["wandb-history.jsonl"]
    writers = ["rank0", "rank0.1", "rank0.2"][: times + 1]
    # One that was killed before it listened has a journal but no rows, and its successor does not know of it.
    assert {"rank0", writers[-1]} <= set(counts) <= set(writers)
    assert counts["rank0"] == 150
    assert sum(counts.values()) == 300
    created = {JournalReader.open(path).header.created for path in ranks.journals()}
    assert len(created) == 1, "the seconds that a row's _runtime counts go on"
    summaries = [data for path in ranks.journals() for data in records_of(path, Kind.SUMMARY)]
    assert summaries == [{"set": {"early": 1}}, {"set": {"weights": "abc"}}], "what rank 0 had passed on is not passed on again"


def _running_aggregator(ranks: Ranks) -> Any:
    import psutil

    (found,) = (
        child
        for child in psutil.Process(ranks.processes[0].pid).children()
        if child.status() != psutil.STATUS_ZOMBIE and "wbdist.distributed.aggregator" in child.cmdline()
    )
    return found


def test_stopped_rank_does_not_stop_the_others(ranks: Ranks) -> None:
    """Proves that a rank that is stopped (SIGSTOP) holds up only the steps it has not passed: the others go on logging, and
    when it goes on too the rows are complete."""
    ranks.start(2, strategy="rank0", steps=200, gate={"1": 50})
    ranks.until("gate", 1)
    journal = ranks.journals()[0]
    until(lambda: len(rows_of(journal)) == 50, "the rows that both passed")
    ranks.processes[1].send_signal(signal.SIGSTOP)
    with JournalReader.open(
        next(path for path in find_journals(ranks.root / "wandb") if path.name.startswith("feed0"))
    ) as feed:
        until(lambda: len(list(feed.read(1 << 22))) >= 0 and len(rows_of(feed.path)) == 200, "rank 0's own rows")
    ranks.open_gate()
    ranks.processes[1].send_signal(signal.SIGCONT)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert ranks.rows() == expected(range(200), range(2))


def test_late_policy_lets_go_of_a_slow_rank(ranks: Ranks) -> None:
    """Proves that with 2 of 3 and no patience steps are written without a rank that hangs, that what it logs for them later is
    counted and changes nothing, and that it takes part again in what comes after."""
    ranks.start(3, strategy="rank0", steps=50, gate={"0": 49, "1": 49, "2": 20}, late={"quorum": 2, "patience": 0.0})
    ranks.until("gate", 3)
    journal = ranks.journals()[0]
    until(lambda: len(rows_of(journal)) == 49, "the steps that two ranks passed")
    assert [row["count"] for row in rows_of(journal)[20:]] == [3] * 29
    ranks.open_gate()
    assert ranks.wait() == [0, 0, 0], ranks.errors()
    rows = ranks.rows()
    assert [row["_step"] for row in rows] == list(range(50))
    assert rows[20:49] == _of_two_ranks(range(20, 49))
    told = [line for line in ranks.errors().splitlines() if "too late" in line]
    assert told, "rows of rank 2 that are not in the run"
    late = re.search(r"(\d+) of rank 2", told[-1])  # others may be late in the first 20, on a busy machine
    assert late is not None
    assert int(late[1]) >= 29


def _of_two_ranks(steps: range) -> list[dict[str, Any]]:
    return expected(steps, range(2))


@pytest.mark.parametrize("size", [2, 4])
def test_stopped_aggregator_stops_nobody(ranks: Ranks, size: int) -> None:
    """Proves that ranks log on to their ends while the aggregator is stopped (SIGSTOP), and that it has all rows in the end."""
    ranks.start(size, strategy="rank0", steps=200, gate={str(rank): 50 for rank in range(size)})
    ranks.until("gate", size)
    aggregator = ranks.aggregator()
    aggregator.suspend()
    ranks.open_gate()
    feeds = [path for path in find_journals(ranks.root / "wandb") if path.name.startswith("feed")]
    until(lambda: all(len(rows_of(path)) == 200 for path in feeds), "all rows in the ranks' journals")
    aggregator.resume()
    assert ranks.wait() == [0] * size, ranks.errors()
    assert ranks.rows() == expected(range(200), range(size))


def test_failing_rank_decides_the_exit_code(ranks: Ranks) -> None:
    """Proves that the run ends with the code of the rank that failed, not with rank 0's."""
    ranks.start(2, strategy="rank0", steps=5, exit={"1": 3})
    assert ranks.wait() == [0, 0], ranks.errors()
    assert records_of(ranks.journals()[0], Kind.END)[0]["exit_code"] == 3


def test_per_rank_runs_share_a_group(ranks: Ranks) -> None:
    """Proves that strategy per_rank gives every rank a run of its own: id, name, group, job type and rank in the config."""
    ranks.start(2, strategy="per_rank", steps=20, drain=9, name="net")
    assert ranks.wait() == [0, 0], ranks.errors()
    for rank, path in enumerate(ranks.journals()):
        with JournalReader.open(path) as reader:
            assert (reader.header.run_id, reader.header.writer) == (f"job-r{rank}", f"rank{rank}")
        facts = records_of(path, Kind.RUN)[0]
        assert (facts["group"], facts["job_type"], facts["display_name"]) == (
            "job",
            ["main", "worker"][rank],
            f"net-rank{rank}",
        )
        config = {key: value for data in records_of(path, Kind.CONFIG) for key, value in data["set"].items()}
        assert (config["rank"], config["world_size"], config["local_rank"], config["lr"]) == (rank, 2, rank, 0.5)
        rows = rows_of(path)
        assert [row["_step"] for row in rows] == list(range(20))
        assert rows[7]["who"] == rank
        position = ranks.events("drained")[rank]["position"]
        assert position["run_id"] == f"job-r{rank}"
        assert position["watermark"]["counts"]["wandb-history.jsonl"] == {f"rank{rank}": 10}


def test_system_metrics_of_every_rank(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the one run has every rank's process by label and each machine once; and that a successor of a killed
    aggregator passes on no sample again."""
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
    ranks.start(2, strategy="rank0", steps=20, gate={"0": 10, "1": 10})
    ranks.until("gate", 2)

    def taken() -> list[set[str]]:
        return [set(data) for path in ranks.journals() for data in records_of(path, Kind.STATS)]

    def labels() -> set[str]:
        return {name.partition("/l:")[2] for names in taken() for name in names if name.startswith("system.")}

    until(lambda: labels() == {"rank0", "rank1"}, "samples of both")
    _running_aggregator(ranks).kill()
    until(lambda: len(ranks.journals()) == 2, "the successor's journal")
    count = len(taken())
    until(lambda: len(taken()) > count + 4, "samples in the successor's journal")
    ranks.open_gate()
    assert ranks.wait() == [0, 0], ranks.errors()
    names = set().union(*taken())
    assert {"system.cpu/l:rank0", "system.cpu/l:rank1", "system.memory_percent/l:rank0"} <= names
    assert "system.memory_percent/l:rank1" not in names
    times = [
        (record.data["_rank"], record.time)
        for path in ranks.journals()
        for record in JournalReader.open(path).read(1 << 24)
        if record.kind is Kind.STATS
    ]
    assert len(times) == len(set(times)), "a sample stands twice"
