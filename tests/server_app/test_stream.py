"""file_stream: what is stored, what is answered, what state follows. In process, over a real store and a clock of our own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from wbdist.core.position import CONSOLE, HISTORY, SUMMARY, Watermark
from wbdist.core.states import RunState
from wbdist.protocol.attempts import BeginAttempt, Ended, StreamStamp
from wbdist.protocol.file_stream import FileChunk, StreamReply, StreamRequest
from wbdist.server import silence, stream
from wbdist.server.context import AppContext
from wbdist.server.store.interface import RunFields, RunRow


def rows(*steps: int) -> list[str]:
    return [json.dumps({"_step": step, "_timestamp": 1.0 + step, "_runtime": float(step), "loss": step / 2}) for step in steps]


class Job:
    """One run with attempts, and its clients' requests."""

    def __init__(self, ctx: AppContext, attempt: int | None = 1) -> None:
        self.ctx = ctx
        run, _ = ctx.store.upsert_run("local", "p", "r1", RunFields(), ctx.clock())
        self.pk = run.pk
        if attempt is not None:
            self.begin(attempt)

    def begin(self, attempt: int, base: Watermark | None = None, nonce: str = "") -> Any:
        request = BeginAttempt(attempt=attempt, nonce=nonce or f"n{attempt}", writer="rank0", base=base)
        return self.ctx.store.begin_attempt(self.pk, request, self.ctx.clock())

    @property
    def row(self) -> RunRow:
        row = self.ctx.store.get_run_by_pk(self.pk)
        assert row is not None
        return row

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.ctx.store.history(self.pk)]

    def send(
        self,
        lines: list[str] | None = None,
        seq: int = 0,
        *,
        attempt: int = 1,
        writer: str = "rank0",
        ended: str = "",
        **fields: Any,
    ) -> tuple[int, StreamReply]:
        """As our client: stamped."""
        files = {} if lines is None else {HISTORY: FileChunk(content=lines, offset=seq)}
        stamp = StreamStamp(
            attempt=attempt,
            nonce=f"n{attempt}",
            writer=writer,
            seq={} if lines is None else {HISTORY: seq},
            ended=Ended(cause=ended) if ended else None,
        )
        return stream.take(self.ctx, self.row, StreamRequest(files=files | fields.pop("files", {}), wbdist=stamp, **fields))

    def send_plain(self, files: dict[str, tuple[int, list[str]]] | None = None, **fields: Any) -> tuple[int, StreamReply]:
        """As W&B's client."""
        chunks = {name: FileChunk(content=content, offset=offset) for name, (offset, content) in (files or {}).items()}
        return stream.take(self.ctx, self.row, StreamRequest(files=chunks, **fields))


def test_repeated_and_overlapping_lines_are_stored_once(ctx: AppContext) -> None:
    """Proves that a request sent again, in whole or in part, changes nothing and is answered like the first."""
    job = Job(ctx)
    status, reply = job.send(rows(0, 1, 2))
    assert (status, reply.wbdist and reply.wbdist.next) == (200, {HISTORY: 3})
    assert job.send(rows(0, 1, 2)) == (status, reply)
    assert job.send(rows(1, 2, 3), seq=1)[1].wbdist.next == {HISTORY: 4}  # type: ignore[union-attr]
    assert job.steps == [0, 1, 2, 3]


def test_a_gap_is_409_with_the_next_seq_and_stores_nothing(ctx: AppContext) -> None:
    """Proves that our client learns from where to send again, and that no line jumps the queue."""
    job = Job(ctx)
    job.send(rows(0))
    status, reply = job.send(rows(5, 6), seq=5, complete=True, exitcode=0)
    assert status == 409
    assert reply.wbdist is not None
    assert (reply.wbdist.code, reply.wbdist.next[HISTORY]) == ("gap", 1)
    assert reply.error
    assert job.steps == [0]
    assert job.row.state == RunState.RUNNING, "the end of a request that was refused must not count"


def test_a_superseded_attempt_is_fenced_and_cannot_end_the_run(ctx: AppContext) -> None:
    """Proves that late lines and the late end of an old attempt change neither history nor state."""
    job = Job(ctx)
    job.send(rows(0, 1, 2, 3))
    job.begin(2, Watermark(attempt=1, counts={HISTORY: {"rank0": 2}}, step=1))
    status, reply = job.send(rows(4), seq=4, attempt=1, complete=True, exitcode=1)
    assert status == 409
    assert reply.wbdist is not None
    assert (reply.wbdist.code, reply.wbdist.attempt) == ("fenced", 2)
    assert job.steps == [0, 1]
    assert job.row.state == RunState.RUNNING
    job.send(rows(2), seq=0, attempt=2)
    assert job.steps == [0, 1, 2]


@pytest.mark.parametrize(
    ("requests", "state"),
    [
        ([{"complete": True, "exitcode": 0}], RunState.FINISHED),
        ([{"complete": True, "exitcode": 3}], RunState.FAILED),
        ([{"complete": True, "exitcode": 255}], RunState.KILLED),
        ([{"complete": True, "exitcode": 255}] * 2, RunState.KILLED),
        ([{"preempting": True}, {"complete": True, "exitcode": 255}], RunState.PREEMPTED),
        ([{"preempting": True, "complete": True, "exitcode": 255}] * 2, RunState.PREEMPTED),
        ([{"preempting": True}], RunState.PREEMPTING),
        ([{"preempting": True}, {}], RunState.PREEMPTING),
        ([{"preempting": True}, {"complete": True, "exitcode": 0}], RunState.FINISHED),
        ([{"preempting": True}, {"complete": True, "exitcode": 75}], RunState.PREEMPTED),
        ([{"preempting": True, "complete": True, "exitcode": 75}], RunState.PREEMPTED),
        ([{"ended": "lost"}], RunState.CRASHED),
        ([{"preempting": True}, {"ended": "lost"}], RunState.PREEMPTED),
        ([{"ended": "preempted"}], RunState.PREEMPTED),
        ([{"ended": "preempted", "complete": True, "exitcode": 75}], RunState.PREEMPTED),
        ([{"ended": "exit", "complete": True, "exitcode": 0}], RunState.FINISHED),
        ([{"ended": "lost"}, {}], RunState.RUNNING),
        ([{"ended": "exit"}], RunState.FINISHED),
        ([{"ended": "exception"}], RunState.FAILED),
        ([{"ended": "exception", "complete": True, "exitcode": 1}], RunState.FAILED),
        ([{"complete": True, "exitcode": 0}, {}], RunState.FINISHED),
    ],
)
def test_states_follow_the_table(ctx: AppContext, requests: list[dict[str, Any]], state: RunState) -> None:
    """Proves that marks, ends and the word of a witness lead where the state table says."""
    job = Job(ctx)
    for request in requests:
        assert job.send(**request)[0] == 200
    assert job.row.state == state


def test_w_and_bs_client_appends_by_offset(ctx: AppContext) -> None:
    """Proves that W&B's retries are no-ops and that bare NaN and Infinity in lines and summary survive."""
    job = Job(ctx, attempt=None)
    line = '{"_step":0,"loss":NaN,"best":-Infinity,"_timestamp":1.5}'
    for _ in range(2):
        status, _ = job.send_plain(
            {HISTORY: (0, [line, *rows(1)]), SUMMARY: (0, ['{"loss":Infinity}']), CONSOLE: (0, ["a", "b"])}
        )
        assert status == 200
    assert job.steps == [0, 1]
    first = ctx.store.history(job.pk)[0]
    assert first["loss"] != first["loss"]
    assert first["best"] == float("-inf")
    assert job.row.summary["loss"] == float("inf")
    assert ctx.store.console(job.pk) == ["a", "b"]


def test_w_and_bs_client_is_never_refused_for_a_gap(ctx: AppContext) -> None:
    """Proves that lines ahead of ours are kept, once, in order: a 4xx would end that client's stream for good."""
    job = Job(ctx, attempt=None)
    job.send_plain({HISTORY: (0, rows(0, 1))})
    for _ in range(2):
        status, _ = job.send_plain({HISTORY: (10, rows(10, 11)), CONSOLE: (0, ["x"])}, complete=True, exitcode=0)
        assert status == 200
    assert job.steps == [0, 1, 10, 11]
    assert ctx.store.console(job.pk) == ["x"]
    assert job.row.state == RunState.FINISHED


def test_w_and_bs_client_may_continue_a_run_of_ours(ctx: AppContext) -> None:
    """Proves that rows of a plain client that resumes a run with attempts follow ours, once, though it knows no attempts."""
    job = Job(ctx)
    job.send(rows(0, 1, 2), complete=True, exitcode=0)
    for offset, steps in ((3, (3, 4)), (3, (3, 4)), (5, (5,))):
        assert job.send_plain({HISTORY: (offset, rows(*steps))})[0] == 200
    assert job.steps == [0, 1, 2, 3, 4, 5]
    assert job.row.line_counts[HISTORY] == 6


def test_an_attempt_that_was_never_begun_is_404(ctx: AppContext) -> None:
    """Proves that our client is told to begin, instead of being sent back to seq 0 for ever."""
    job = Job(ctx)
    with pytest.raises(HTTPException, match="never begun"):
        job.send(rows(0), attempt=7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": {CONSOLE: FileChunk(content=["x"])}}, "seq lacks output.log"),
        ({"lines": rows(0), "seq": -1}, "negative"),
        ({"files": {SUMMARY: FileChunk(content=["[1]"])}}, "must be a JSON object"),
    ],
)
def test_senseless_requests_are_named(ctx: AppContext, fields: dict[str, Any], message: str) -> None:
    """Proves that a request that contradicts itself is refused as a whole, with a message that says why."""
    job = Job(ctx)
    with pytest.raises(ValueError, match=message):
        job.send(**fields)
    assert job.steps == []


def test_the_last_word_beats_a_guess(ctx: AppContext, clock: Any) -> None:
    """Proves that an attempt thought dead of silence, or ended by its successor, gets its true end when that is told."""
    job = Job(ctx)
    started = clock.now
    clock.now += 301
    silence.sweep(ctx, started)
    job.send(complete=True, exitcode=0, ended="exit")
    assert [(a.end_cause, a.exit_code) for a in ctx.store.attempts(job.pk)] == [("exit", 0)]
    job.begin(2)
    job.begin(3)
    job.send(rows(0, 1), attempt=2, ended="lost")
    assert [a.end_cause for a in ctx.store.attempts(job.pk)] == ["exit", "lost", ""]


@pytest.mark.parametrize("words", [("lost", "exit"), ("exit", "lost")])
def test_of_two_writers_the_one_that_ends_the_attempt_decides(ctx: AppContext, words: tuple[str, str]) -> None:
    """Proves that an attempt whose first writer was lost, and whose second ended it, has ended by the second's word, in
    whatever order the two journals arrive."""
    job = Job(ctx)
    for word in words:
        complete: dict[str, Any] = {"complete": True, "exitcode": 0} if word == "exit" else {}
        job.send(rows(0, 1), writer="rank0" if word == "lost" else "rank0.1", ended=word, **complete)
    assert [(a.end_cause, a.exit_code) for a in ctx.store.attempts(job.pk)] == [("exit", 0)]
    assert job.row.state == RunState.FINISHED


def test_an_attempt_with_a_living_writer_has_not_ended(ctx: AppContext) -> None:
    """Proves that rows of a second writer take back the end that the first one's loss looked like."""
    job = Job(ctx)
    job.send(rows(0, 1), ended="lost")
    assert job.row.state == RunState.CRASHED
    job.send(rows(1, 2), writer="rank0.1")
    assert [(a.end_cause, a.ended_at) for a in ctx.store.attempts(job.pk)] == [("", None)]
    assert job.row.state == RunState.RUNNING


def test_a_fenced_attempt_may_tell_its_end(ctx: AppContext) -> None:
    """Proves that the end of an attempt whose lines only go to the archive is kept, and changes nothing of the run; and that a
    rival incarnation of its number cannot end it."""
    job = Job(ctx)
    job.begin(2)
    request = StreamRequest(wbdist=StreamStamp(1, "rival", "rank0", {}, Ended("lost")))
    assert stream.take(ctx, job.row, request)[0] == 409
    assert ctx.store.attempts(job.pk)[0].end_cause == "superseded"
    status, reply = job.send(rows(0, 1), complete=True, exitcode=75, ended="exit")
    assert (status, reply.wbdist.code if reply.wbdist else "") == (409, "fenced")
    first = ctx.store.attempts(job.pk)[0]
    assert (first.end_cause, first.exit_code, first.rows, first.rows_live) == ("exit", 75, 2, 0)
    assert (job.row.state, job.steps) == (RunState.RUNNING, [])


def test_silence_ends_runs_but_not_before_the_server_has_listened(ctx: AppContext, clock: Any) -> None:
    """Proves the heartbeat rule to the second, for running and marked runs, and that a beat brings a crashed run back."""
    job = Job(ctx)
    started = clock.now
    clock.now += 299
    assert silence.sweep(ctx, started) == 0
    job.send()
    clock.now += 299
    assert silence.sweep(ctx, started) == 0, "it spoke 299 s ago"
    clock.now += 2
    assert silence.sweep(ctx, clock.now - 10) == 0, "a server that just started has not listened long enough"
    assert silence.sweep(ctx, started) == 1
    assert job.row.state == RunState.CRASHED
    (attempt,) = ctx.store.attempts(job.pk)
    assert (attempt.end_cause, attempt.ended_at) == ("silence", clock.now)
    job.send()
    assert job.row.state == RunState.RUNNING
    (attempt,) = ctx.store.attempts(job.pk)
    assert (attempt.end_cause, attempt.ended_at) == ("", None)
    job.send(preempting=True)
    clock.now += 301
    silence.sweep(ctx, started)
    assert job.row.state == RunState.PREEMPTED
