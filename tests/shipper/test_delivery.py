"""One journal to one server, step by step: what is sent, and that every fault ends with every row there exactly once."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import waiting

from wbdist.core.position import HISTORY, PHASES, Watermark
from wbdist.run.journal import JournalWriter, Kind
from wbdist.run.shipper import remote
from wbdist.run.shipper.delivery import Delivery, Pace, State
from wbdist.run.shipper.lane import Lane
from wbdist.run.shipper.remote import Remote

FAST = Pace(ours=0.0, foreign=0.0, poll=0.0, idle=0.0, retry_min=0.01, retry_max=0.02)


@pytest.fixture
def deliver(loopback: Any) -> Iterator[Callable[..., Delivery]]:
    """Makes deliveries to the loopback server, each with a connection of its own."""
    made: list[Delivery] = []

    def make(writer: JournalWriter, pace: Pace = FAST, url: str = "") -> Delivery:
        made.append(Delivery(writer.path, Remote(url or loopback.url, "k" * 40), logging.getLogger("test"), pace))
        return made[-1]

    yield make
    for delivery in made:
        delivery.close()
        delivery.remote.close()


def run(delivery: Delivery, wandb: Any, *, until: Callable[[], Any] | None = None) -> Delivery:
    """Steps until everything in the journal is acknowledged, or `until` holds."""
    ticket = delivery.ask()
    clock = [1e9]

    def reached() -> bool:
        for _ in range(100):
            clock[0] = max(clock[0] + 0.05, delivery.due)
            delivery.step(clock[0])
            if delivery.finished or (until() if until else delivery.flushed >= ticket):
                return True
        return False

    waiting.until(reached, "the delivery")
    return delivery


def steps(server: Any, attempt: int = 1) -> list[int]:
    return [row["_step"] for row in server.history(attempt)]


def test_a_whole_run(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that rows, facts, config, summary, console, statistics and the end arrive as W&B's wire has them."""
    writer = wandb.journal(loopback.url, created=100.0, runtime=7.0, summary={"before": 1})
    writer.append(Kind.RUN, {"display_name": "first", "group": "g", "tags": ["t"]})
    writer.append(Kind.CONFIG, {"set": {"lr": 0.1, "old": 1}})
    writer.append(Kind.CONFIG, {"set": {"lr": 0.2}, "delete": ["old"]})
    writer.append_row({"loss": float("nan"), "n": {"a": 1}}, step=0, commit=False, time=101.0)
    writer.append_row({"acc": None}, step=0, commit=True, time=102.0)
    writer.append(Kind.CONSOLE, {"text": "hello", "stream": "stderr"}, 103.0)
    writer.append(Kind.STATS, {"system.cpu": 3.0}, 104.0)
    writer.append(Kind.SUMMARY, {"set": {"best": 2}})
    writer.append_row({"loss": 0.5}, step=1, commit=False, time=105.0)
    writer.close(0)
    delivery = run(deliver(writer), wandb)
    assert (delivery.state, delivery.error) == (State.DONE, "")
    first, second = loopback.history()
    assert str(first.pop("loss")) == "nan"
    assert first == {"n.a": 1, "acc": None, "_step": 0, "_timestamp": 102.0, "_runtime": 9.0}
    assert second == {"loss": 0.5, "_step": 1, "_timestamp": 105.0, "_runtime": 12.0}
    assert loopback.lines[1, "rank0", "output.log"] == ["ERROR 1970-01-01T00:01:43.000000 hello"]
    assert json.loads(loopback.lines[1, "rank0", "wandb-events.jsonl"][0])["_runtime"] == 11.0
    assert {k: v for k, v in loopback.config.items() if k != "_wandb"} == {"lr": {"value": 0.2}}
    assert "t" in loopback.config["_wandb"]["value"]
    assert (loopback.facts["displayName"], loopback.facts["groupName"], loopback.facts["tags"]) == ("first", "g", ["t"])
    summary = {k: v for k, v in loopback.summary.items() if not k.startswith("_")}
    assert summary == {"before": 1, "loss": 0.5, "n.a": 1, "best": 2}
    assert loopback.marks == ["begin 1", "complete 0", "ended exit"]


def test_a_delivery_begun_again_sends_nothing_twice(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a new delivery of the same journal (the old shipper was killed) asks where to go on."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 2500)
    run(deliver(writer), wandb)
    sent = len(loopback.requests)
    wandb.rows(writer, 2500, 2600)
    run(deliver(writer), wandb)
    content = [body["files"][HISTORY]["content"] for path, body in loopback.requests[sent:] if HISTORY in body.get("files", {})]
    assert sum(map(len, content)) == 100
    assert steps(loopback) == list(range(2600))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_bad_network_changes_nothing(
    loopback: Any, wandb: Any, deliver: Callable[..., Delivery], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Proves that requests lost before or after they took effect, answers that never come, server errors and rate limits
    leave each row exactly once, in order."""
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    chance = random.Random(seed)
    loopback.fault = lambda path, body: chance.choice([None, None, None, "drop", "drop-after", "stall", 500, 503, 429])
    writer = wandb.journal(loopback.url)
    delivery = deliver(writer)
    for part in range(4):
        wandb.rows(writer, part * 300, part * 300 + 300)
        run(delivery, wandb)
        assert steps(loopback) == list(range(part * 300 + 300)), "acknowledged, but not there"
        if chance.random() < 0.5:
            delivery = deliver(writer)
    writer.close(0)
    assert run(delivery, wandb).state is State.DONE
    assert steps(loopback) == list(range(1200))
    assert loopback.marks.count("begin 1") == 1


def test_retry_after_is_obeyed(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a server's Retry-After replaces our own back-off."""
    loopback.fault = lambda path, body: 429
    delivery = deliver(wandb.journal(loopback.url, created=0.0))
    delivery.step(1e9)
    assert delivery.due == 1e9 + 0.3


def test_a_gap_goes_back(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a server that lost lines (restored from a backup) gets them again, from the place it names."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 1500)
    delivery = run(deliver(writer), wandb)
    del loopback.lines[1, "rank0", HISTORY][700:]
    wandb.rows(writer, 1500, 1510)
    run(delivery, wandb)
    assert steps(loopback) == list(range(1510))


def test_a_refusal_is_final_and_clear(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a 4xx ends the delivery with the server's reason, and that a missing key is named."""
    loopback.fault = lambda path, body: 401
    writer = wandb.journal(loopback.url, created=0.0)
    delivery = deliver(writer)
    delivery.remote.api_key = None
    delivery.step(1e9)
    assert delivery.state is State.FAILED
    assert "401" in delivery.error
    assert "wbdist login" in delivery.error


def test_a_lost_writer_is_reported(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that the end of a writer without END is reported as `lost`, after all its rows, the open one included."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 5)
    writer.append_row({"open": 1}, step=5, commit=False, time=1.0)
    delivery = deliver(writer)
    run(delivery, wandb)
    assert steps(loopback) == list(range(5))
    writer._release()  # what the kernel does when the process dies: the lock is gone, no END was written
    writer._gone = None
    writer.close = lambda *_: None  # type: ignore[method-assign]
    run(delivery, wandb)
    assert delivery.state is State.DONE
    assert steps(loopback) == list(range(6))
    assert loopback.marks == ["begin 1", "ended lost"]


def test_a_part_of_a_run_says_nothing_of_the_run(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves of a process that logs into another's run, such as a pool's worker, that its rows arrive, and nothing that it
    says of the run: neither how it ended, killed or by itself, nor a name or config."""
    run(deliver(wandb.journal(loopback.url)), wandb)
    for number, killed in enumerate((True, False)):
        part = wandb.journal(loopback.url, writer=f"w{number}", place="run-r1-1", primary=False)
        delivery = run(deliver(part), wandb)
        marks, facts = list(loopback.marks), dict(loopback.facts)
        part.append(Kind.RUN, {"display_name": "a worker's"})
        part.append(Kind.CONFIG, {"set": {"lr": 9.0}})
        wandb.rows(part, number, number + 1)
        if killed:
            part._release()
            part._gone = None
            part.close = lambda *_: None  # type: ignore[method-assign]
        else:
            part.close(None)
        assert run(delivery, wandb).state is State.DONE
        assert (loopback.marks, loopback.facts) == (marks, facts)
    assert [json.loads(loopback.lines[1, f"w{number}", HISTORY][0])["_step"] for number in (0, 1)] == [0, 1]
    assert "lr" not in loopback.config


def test_preempting_goes_out_at_once(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that the preempting mark does not wait for the next interval, and is sent once."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 3)
    delivery = deliver(writer, Pace(ours=1e6, heartbeat=1e6, poll=0.0, idle=0.0))
    run(delivery, wandb)
    wandb.rows(writer, 3, 6)
    writer.append(Kind.PREEMPTING, {})
    run(delivery, wandb, until=lambda: "preempting" in loopback.marks)
    assert steps(loopback) == list(range(6))
    writer.close(75, "preempted")
    run(delivery, wandb)
    assert loopback.marks == ["begin 1", "preempting", "complete 75", "ended preempted"]


def test_heartbeats(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a silent but living writer is beaten for at the asked interval, with nothing in the request but the stamp."""
    writer = wandb.journal(loopback.url, created=0.0)
    delivery = run(deliver(writer, Pace(heartbeat=30.0, poll=0.0, idle=0.0)), wandb)
    before = len(loopback.requests)
    for now in range(0, 100, 10):
        delivery.step(2e9 + now)
    beats = [body for _, body in loopback.requests[before:]]
    assert beats == [{"wbdist": {"attempt": 1, "nonce": "n1", "writer": "rank0"}}] * 4


def test_a_superseded_attempt_is_fenced(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a delivery learns that a newer attempt took over, puts what was logged into the archive, changes nothing
    else of the run, and goes on for as long as the writer logs, until it has told how that one ended."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 10)
    delivery = run(deliver(writer), wandb)
    loopback.attempt, loopback.nonce = 2, "other"
    writer.append(Kind.SUMMARY, {"set": {"late": 1}})
    wandb.rows(writer, 10, 20)
    run(delivery, wandb)
    assert delivery.fenced
    assert "attempt 2" in delivery.error
    assert steps(loopback) == list(range(20))
    wandb.rows(writer, 20, 30)
    run(delivery, wandb)
    assert steps(loopback) == list(range(30)), "a zombie that keeps logging is archived to its last row"
    assert (delivery.finished, loopback.archived_ends) == (False, {})
    wandb.rows(writer, 30, 40)
    writer.close(1)
    run(delivery, wandb)
    assert delivery.state is State.FENCED
    assert steps(loopback) == list(range(40))
    assert loopback.archived_ends == {1: "exit"}
    assert "late" not in loopback.summary
    again = run(deliver(writer), wandb)
    assert again.state is State.FENCED
    assert steps(loopback) == list(range(40))


def test_a_rival_incarnation_of_the_same_attempt_goes_to_the_archive(
    loopback: Any, wandb: Any, deliver: Callable[..., Delivery]
) -> None:
    """Proves that of two incarnations with the same attempt number the second touches no line of the first, and that what it
    logs is kept under its own name, however often it is sent."""
    loopback.attempt, loopback.nonce = 1, "other"
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 10)
    delivery = run(deliver(writer), wandb)
    assert delivery.fenced
    assert "another job holds attempt 1" in delivery.error
    writer.close(0)
    assert run(delivery, wandb).state is State.FENCED
    assert run(deliver(writer), wandb).state is State.FENCED
    assert loopback.lines == {}
    assert [len(lines) for lines in loopback.rivals[writer.header.nonce].values()] == [10]


def test_a_shorter_copy_says_nothing_that_is_out_of_date(
    loopback: Any, wandb: Any, deliver: Callable[..., Delivery], tmp_path: Path
) -> None:
    """Proves that a journal which was copied before it was complete, and arrives after it, neither sets summary and config
    back nor says how the writer ended."""
    writer = wandb.journal(loopback.url)
    writer.append(Kind.CONFIG, {"set": {"lr": 1}})
    wandb.rows(writer, 0, 10)
    copy = tmp_path / "copy.wbdj"
    copy.write_bytes(writer.path.read_bytes())
    writer.append(Kind.CONFIG, {"set": {"lr": 2}})
    wandb.rows(writer, 10, 20)
    writer.close(0)
    assert run(deliver(writer), wandb).state is State.DONE
    summary, config, marks = dict(loopback.summary), dict(loopback.config), list(loopback.marks)
    late = Delivery(copy, deliver(writer).remote, logging.getLogger("test"), FAST)
    assert run(late, wandb).state is State.DONE
    assert (loopback.summary, loopback.config, loopback.marks) == (summary, config, marks)
    assert steps(loopback) == list(range(20))


def test_a_new_attempt_names_its_base(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that BeginAttempt carries the base watermark and that lines of the attempt count from 0 again."""
    base = Watermark(attempt=1, counts={HISTORY: {"rank0": 10}}, step=9)
    writer = wandb.journal(loopback.url, attempt=2, base=base, cause="lost")
    wandb.rows(writer, 10, 15)
    run(deliver(writer), wandb)
    begin = next(body["variables"]["input"] for _, body in loopback.requests if body.get("operationName") == "BeginAttempt")
    assert begin["base"] == {"attempt": 1, "counts": {HISTORY: {"rank0": 10}}, "step": 9}
    assert begin["cause"] == "lost"
    assert steps(loopback, attempt=2) == list(range(10, 15))


def test_memory_is_bounded_while_the_server_is_away(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a backlog stays in the journal: of 12000 rows, no more than one read's worth is held while requests fail."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 10)
    delivery = run(deliver(writer), wandb)
    wandb.rows(writer, 10, 12_000)
    loopback.fault = lambda path, body: 500
    for now in range(50):
        delivery.step(2e9 + now)
    assert 0 < len(delivery._translator.lines[HISTORY]) < 8000
    loopback.fault = lambda path, body: None
    run(delivery, wandb)
    assert steps(loopback) == list(range(12_000))


def test_requests_are_bounded(loopback: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that no request carries more than 1000 lines or about 1 MiB, a longer single line apart."""
    writer = wandb.journal(loopback.url)
    wandb.rows(writer, 0, 3500)
    for step in range(3500, 3510):
        writer.append_row({"text": "x" * 300_000}, step=step, commit=True, time=1.0)
    writer.append_row({"text": "x" * 2_000_000}, step=3510, commit=True, time=1.0)
    run(deliver(writer), wandb)
    sizes = [body["files"][HISTORY]["content"] for _, body in loopback.requests if HISTORY in body.get("files", {})]
    assert max(map(len, sizes)) <= 1000
    assert all(sum(map(len, lines)) <= 1 << 20 or len(lines) == 1 for lines in sizes)
    assert steps(loopback) == list(range(3511))


def test_a_foreign_server_gets_w_and_bs_own_rule(foreign: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that on a server without attempts lines are placed by offset, behind what the run had, and that sending them again
    after a restart overwrites instead of appending. What belongs to an attempt is not sent at all."""
    foreign.offsets = {0: "old", 1: "old"}
    writer = wandb.journal(foreign.url)
    writer.append(Kind.PHASE, {"n": 0, "phase": "train", "_step": 0})
    wandb.rows(writer, 0, 50)
    run(deliver(writer, url=foreign.url), wandb)
    wandb.rows(writer, 50, 60)
    run(deliver(writer, url=foreign.url), wandb)
    writer.close(0)
    run(deliver(writer, url=foreign.url), wandb)
    assert sorted(foreign.offsets) == list(range(62))
    assert [json.loads(foreign.offsets[2 + i])["i"] for i in range(60)] == list(range(60))
    assert foreign.marks == ["complete 0", "ended exit"]
    assert not [body for _, body in foreign.requests if PHASES in body.get("files", {})]


def test_a_journal_that_is_not_understood_stops_no_other(loopback: Any, wandb: Any) -> None:
    """Proves that a record which this version cannot read costs its own journal alone: who waits for it is told why, the
    journals beside it are delivered. Such a journal comes of another version."""
    odd, sound = wandb.journal(loopback.url, run_id="a"), wandb.journal(loopback.url, run_id="b", attempt=2)
    odd.append(Kind.FILE, {"name": "of/another/version"})
    wandb.rows(sound, 0, 5)
    lane = Lane(loopback.url, "", lambda: "k" * 40, logging.getLogger("test"), FAST)
    try:
        lane.add(odd.path, None)
        acked, error = lane.flush(odd.path, 20.0, priority=False)
        assert not acked
        assert error.startswith("a fault of the shipper (ValidationError")
        lane.add(sound.path, None)
        assert lane.flush(sound.path, 20.0, priority=False) == (True, "")
    finally:
        lane.stop(1.0)
    assert steps(loopback, attempt=2) == list(range(5))


def test_a_damaged_memory_of_a_foreign_server_is_named(foreign: Any, wandb: Any, deliver: Callable[..., Delivery]) -> None:
    """Proves that a file cut off by a power loss is named with what follows from it, instead of sending everything twice."""
    writer = wandb.journal(foreign.url)
    wandb.rows(writer, 0, 2)
    memory = writer.path.with_name(writer.path.name + ".offsets")
    memory.touch()
    delivery = run(deliver(writer, url=foreign.url), wandb)
    assert delivery.state is State.FAILED
    assert f"{memory} does not say what the server has" in delivery.error
    assert foreign.offsets == {}
