"""The store against a model of a few lines: any sequence of begins, forks, rewinds, appends, repeats, gaps and restarts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.storing import NOW, StoredRun

from wbdist.core.position import CONSOLE, EVENTS, HISTORY, STREAMS, Watermark
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt
from wbdist.server.store import open_store
from wbdist.server.store.interface import BranchError

RUNS = ("r", "s")
WRITERS = ("a", "b")
RIVAL = "rival"
FRESH = st.sampled_from([(), (), (CONSOLE, EVENTS), (HISTORY,)])


class Base(NamedTuple):
    run: str
    watermark: Watermark
    fresh: tuple[str, ...] = ()


class Segment(NamedTuple):
    run: str
    attempt: int
    limits: dict[str, dict[str, int]] | None


class Model:
    """What the store promises, written down as plainly as possible: lists of lines, and a base for each attempt."""

    def __init__(self) -> None:
        self.bases: dict[tuple[str, int], Base | None] = {}
        self.requests: dict[tuple[str, int], BeginAttempt] = {}
        self.lines: dict[tuple[str, int, str, str, str], list[Any]] = {}
        self.current = dict.fromkeys(RUNS, 0)

    def begun(self, run: str) -> list[int]:
        return [attempt for name, attempt in self.requests if name == run]

    def sequence(self, run: str, attempt: int, lane: str, stream: str, writer: str) -> list[Any]:
        return self.lines.setdefault((run, attempt, lane, stream, writer), [])

    def segments(self, run: str, attempt: int) -> list[Segment]:
        """Newest first."""
        out, limits, hidden = [Segment(run, attempt, None)], None, set[str]()
        while (base := self.bases.get((run, attempt))) is not None:
            hidden |= set(base.fresh)
            limits = {stream: by for stream, by in base.watermark.counts.items() if stream not in hidden}
            run, attempt = base.run, base.watermark.attempt
            out.append(Segment(run, attempt, limits))
        return out

    def part(self, segment: Segment, stream: str, writer: str) -> list[Any]:
        lines = self.sequence(segment.run, segment.attempt, "", stream, writer)
        return lines if segment.limits is None else lines[: segment.limits.get(stream, {}).get(writer, 0)]

    def view(self, run: str, attempt: int, stream: str) -> list[Any]:
        """Live lines in order."""
        out: list[Any] = []
        for segment in self.segments(run, attempt):
            own = [line for writer in WRITERS for line in self.part(segment, stream, writer)]
            out = (sorted(own, key=lambda row: row["_step"]) if stream == HISTORY else own) + out
        return out

    def cut(self, run: str, attempt: int, step: int) -> Base:
        """In the newest attempt with a row up to `step`: of each writer what lies before its first row beyond."""
        for segment in self.segments(run, attempt):
            have = {writer: self.part(segment, HISTORY, writer) for writer in WRITERS}
            kept = {w: next((i for i, r in enumerate(rows) if r["_step"] > step), len(rows)) for w, rows in have.items()}
            if any(kept.values()):
                counts = {HISTORY: kept}
                if all(kept[writer] == len(rows) for writer, rows in have.items()):
                    counts |= {s: {w: len(self.part(segment, s, w)) for w in WRITERS} for s in (CONSOLE, EVENTS)}
                return Base(segment.run, Watermark(segment.attempt, counts))
        return Base(segment.run, Watermark(segment.attempt, {}))

    def hides(self, run: str, attempt: int, stream: str, writer: str) -> bool:
        """Whether a writer of `attempt` is past what can be live; always, when nothing of that attempt is in the view."""
        found = [s for s in self.segments(run, self.current[run]) if (s.run, s.attempt) == (run, attempt)]
        if not found:
            return True
        limits = found[0].limits
        written = len(self.sequence(run, attempt, "", stream, writer))
        return limits is not None and written > limits.get(stream, {}).get(writer, 0)

    def reaches(self, start: tuple[str, int], goal: tuple[str, int]) -> bool:
        """Whether `start` is built, by way of others, on `goal`."""
        return any((s.run, s.attempt) == goal for s in self.segments(*start))

    def summary(self, run: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for row in self.view(run, self.current[run], HISTORY):
            out |= {key: value for key, value in row.items() if value is not None}
        return out


class StoreMachine(RuleBasedStateMachine):
    """Drives store and model; the values of a line say where it belongs, so a mix-up shows."""

    @initialize()
    def open(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="wbdist-model-"))
        self.store = open_store(f"sqlite:///{self.place / 'store.db'}")
        StoredRun(self.store, "other")
        self.runs = {name: StoredRun(self.store, name) for name in RUNS}
        self.model = Model()
        self.serial = 0
        self.versions = {name: run.row.version for name, run in self.runs.items()}

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.check_archive()
        self.store.close()
        shutil.rmtree(self.place)

    def begin_with(self, run: str, request: BeginAttempt) -> BegunAttempt:
        return self.store.begin_attempt(self.runs[run].pk, request, NOW)

    def counts(self, data: st.DataObject) -> dict[str, dict[str, int]]:
        return {stream: {writer: data.draw(st.integers(0, 9)) for writer in WRITERS} for stream in STREAMS}

    @rule(run=st.sampled_from(RUNS), skip=st.integers(0, 2), fresh=FRESH, data=st.data())
    def begin(self, run: str, skip: int, fresh: tuple[str, ...], data: st.DataObject) -> None:
        """The next attempt, or one further on, on any older one; lines below the base may not have come yet."""
        attempt = self.model.current[run] + 1 + skip
        older = data.draw(st.integers(0, attempt - 1))
        watermark = Watermark(older, self.counts(data), 0) if older else None
        request = BeginAttempt(attempt, f"n{attempt}", "w", watermark, fresh=fresh)
        if self.model.reaches((run, older), (run, attempt)):
            return
        assert self.begin_with(run, request).accepted
        self.note(run, request, None if watermark is None else Base(run, watermark, fresh))

    def note(self, run: str, request: BeginAttempt, base: Base | None) -> None:
        self.model.bases[run, request.attempt] = base
        self.model.requests[run, request.attempt] = request
        self.model.current[run] = max(self.model.current[run], request.attempt)

    @rule(run=st.sampled_from(RUNS), fresh=FRESH, by=st.sampled_from(["step", "position", "incarnation"]), data=st.data())
    def branch(self, run: str, fresh: tuple[str, ...], by: str, data: st.DataObject) -> None:
        """A rewind within the run or a fork of the other, by a step, by the position at it, or of an older incarnation."""
        model, attempt = self.model, self.model.current[run] + 1
        source = data.draw(st.sampled_from([name for name in RUNS if model.begun(name)] or [None]))
        if source is None:
            return
        at = data.draw(st.sampled_from(model.begun(source))) if by == "incarnation" else model.current[source]
        steps = [row["_step"] for row in model.view(source, at, HISTORY)]
        if not steps:
            return
        step = data.draw(st.integers(0, max(steps)))
        base = model.cut(source, at, step)
        name = f"{source}:{at}" if by == "incarnation" else "" if source == run else source
        request = BeginAttempt(attempt, f"n{attempt}", "w", at_step=step, base_run=name, fresh=fresh)
        if by == "position":
            found = self.store.position(self.runs[source].row, step=step)
            assert found.run_id == base.run
            here = "" if found.run_id == run else found.run_id
            request = BeginAttempt(attempt, f"n{attempt}", "w", found.watermark, base_run=here, fresh=fresh)
        if self.model.reaches((base.run, base.watermark.attempt), (run, attempt)):
            with pytest.raises(BranchError, match="based on itself"):  # the other run was built on this attempt beforehand
                self.begin_with(run, request)
            return
        assert self.begin_with(run, request).accepted
        self.note(run, request, base._replace(fresh=fresh))

    @rule(run=st.sampled_from(RUNS), data=st.data())
    def fork_early(self, run: str, data: st.DataObject) -> None:
        """Built on an attempt of the other run that was not heard of yet, as an offline fork may come first."""
        other = next(name for name in RUNS if name != run)
        attempt, older = self.model.current[run] + 1, self.model.current[other] + 1
        watermark = Watermark(older, self.counts(data), 0)
        request = BeginAttempt(attempt, f"n{attempt}", "w", watermark, base_run=other)
        assert self.begin_with(run, request).accepted
        self.note(run, request, Base(other, watermark))

    def late(self) -> list[tuple[str, int]]:
        """Attempts that were passed over."""
        return [(run, n) for run in RUNS for n in range(1, self.model.current[run]) if (run, n) not in self.model.requests]

    @precondition(lambda self: self.late())
    @rule(data=st.data())
    def begin_late(self, data: st.DataObject) -> None:
        """An attempt that was passed over says now on what it was built."""
        run, attempt = data.draw(st.sampled_from(self.late()))
        older = data.draw(st.integers(0, attempt - 1))
        if older and self.model.reaches((run, older), (run, attempt)):
            return  # it would be built on itself, by way of the other run; refused, see the tests of branches
        watermark = Watermark(older, self.counts(data)) if older else None
        request = BeginAttempt(attempt, f"n{attempt}", "w", watermark)
        self.begin_with(run, request)
        self.note(run, request, None if watermark is None else Base(run, watermark))

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), rival=st.booleans())
    def begin_again(self, data: st.DataObject, rival: bool) -> None:
        """A repeat of a known attempt, and a rival that wants its number: nothing changes."""
        run, attempt = data.draw(st.sampled_from(list(self.model.requests)))
        request = self.model.requests[run, attempt]
        if rival:
            request = BeginAttempt(attempt, RIVAL, "w", request.base if not request.base_run else None)
        done = self.begin_with(run, request)
        assert not (rival and done.accepted)
        assert done.attempt == self.model.current[run]
        assert self.runs[run].row.version == self.versions[run]

    @precondition(lambda self: self.model.requests)
    @rule(
        data=st.data(),
        lane=st.sampled_from(["", "", "", RIVAL]),
        writer=st.sampled_from(WRITERS),
        stream=st.sampled_from([HISTORY, HISTORY, EVENTS, CONSOLE]),
        count=st.integers(0, 12),
        offset=st.integers(-4, 1),
    )
    def append(self, data: st.DataObject, lane: str, writer: str, stream: str, count: int, offset: int) -> None:
        """Lines to any attempt, by its owner or a rival, in place, overlapping with what is there, or after a gap."""
        newest = [(run, n) for run, n in self.model.current.items() if n]
        run, attempt = data.draw(st.sampled_from([*self.model.requests, *newest, *newest]))
        if (run, attempt) not in self.model.requests:
            return
        known = self.model.sequence(run, attempt, lane, stream, writer)
        start = max(0, len(known) + offset)
        lines = [self.line(stream, f"{run}{attempt}", lane, writer) for _ in range(count)]
        done = self.runs[run].append(attempt, start, lines, stream=stream, nonce=lane or None, writer=writer)
        if start > len(known):
            assert (done.code, done.next) == ("gap", {stream: len(known)})
            return
        new = lines[len(known) - start :]
        known += new
        assert done.next == {stream: len(known)}
        assert done.code == ("fenced" if lane or self.model.hides(run, attempt, stream, writer) else "")
        version = self.runs[run].row.version
        assert version > self.versions[run] if new else version == self.versions[run]

    def line(self, stream: str, place: str, lane: str, writer: str) -> Any:
        self.serial += 1
        if stream == CONSOLE:
            return f"{place}{lane}{writer}{self.serial}"
        row = {"_step": self.serial} if stream == HISTORY else {}
        return row | {"n": self.serial, f"at{place}": float(self.serial), "who": lane + writer}

    @rule()
    def reopen(self) -> None:
        """A restart of the server."""
        self.check_archive()
        self.store.close()
        self.store = open_store(f"sqlite:///{self.place / 'store.db'}")
        for run in self.runs.values():
            run.store = self.store

    @invariant()
    def live_view_and_archive_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        for name, run in self.runs.items():
            self.check(name, run)

    def check(self, name: str, run: StoredRun) -> None:
        model, row = self.model, run.row
        assert row.version >= self.versions[name]
        self.versions[name] = row.version
        live = {stream: model.view(name, model.current[name], stream) for stream in STREAMS}
        assert run.history() == live[HISTORY]
        assert run.history(stream=EVENTS) == live[EVENTS]
        assert self.store.console(run.pk) == live[CONSOLE]
        assert self.store.history_tail(run.pk, HISTORY) == (live[HISTORY][-1] if live[HISTORY] else None)
        assert [(b.lo, b.last) for b in self.store.series(run.pk, "n", buckets=10_000)] == sorted(
            (r["_step"], float(r["n"])) for r in live[HISTORY]
        )
        assert {s: n for s, n in row.line_counts.items() if n} == {s: len(lines) for s, lines in live.items() if lines}
        assert row.last_step == max((r["_step"] for r in live[HISTORY]), default=-1)
        assert row.metrics == sorted({k for r in live[HISTORY] for k in r if k not in {"_step", "who"}})
        assert row.summary == model.summary(name)

    def check_archive(self) -> None:
        """Everything ever accepted can be read: each attempt's view, each rival's lines, whole incarnations by their ids."""
        model = self.model
        for name, run in self.runs.items():
            written = {a.attempt: a.rows for a in self.store.attempts(run.pk)}
            for attempt in model.begun(name):
                view = model.view(name, attempt, HISTORY)
                assert run.history(attempt=attempt) == view
                rival = [line for writer in WRITERS for line in model.sequence(name, attempt, RIVAL, HISTORY, writer)]
                assert run.history(attempt=attempt, nonce=RIVAL) == sorted(rival, key=lambda r: r["_step"])
                assert written[attempt] == sum(len(model.sequence(name, attempt, "", HISTORY, w)) for w in WRITERS)
                found = self.store.find_run("e", "p", f"{name}:{attempt}")
                assert found is not None
                assert (found.line_counts.get(HISTORY, 0), found.view) == (len(view), attempt)


@pytest.mark.usefixtures("tiny")
def test_the_store_agrees_with_the_model() -> None:
    """After every step: live view, archive, counts, summary, metrics, charts and versions are the model's."""
    quick = [Phase.explicit, Phase.generate, Phase.shrink]  # explaining a failure traces every line of the store
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(max_examples=6, stateful_step_count=25, deadline=None, phases=quick, suppress_health_check=quiet),
    )
