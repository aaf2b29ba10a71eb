"""The store against a model of a few lines: any sequence of begins, appends, repeats, gaps, rivals and restarts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.storing import StoredRun

from wbdist.core.position import CONSOLE, EVENTS, HISTORY, STREAMS, Watermark
from wbdist.server.store import open_store

WRITERS = ("a", "b")
RIVAL = "rival"


class Model:
    """What the store promises, written down as plainly as possible: lists of lines, and a base for each attempt."""

    def __init__(self) -> None:
        self.bases: dict[int, Watermark | None] = {}
        self.begun: list[int] = []
        self.lines: dict[tuple[int, str, str, str], list[Any]] = {}
        self.current = 0

    def sequence(self, attempt: int, lane: str, stream: str, writer: str) -> list[Any]:
        return self.lines.setdefault((attempt, lane, stream, writer), [])

    def view(self, attempt: int, stream: str) -> list[Any]:
        """Live lines in order."""
        out: list[Any] = []
        limits: dict[str, int] | None = None
        while True:
            own = []
            for writer in WRITERS:
                lines = self.sequence(attempt, "", stream, writer)
                own += lines if limits is None else lines[: limits.get(writer, 0)]
            out = (sorted(own, key=lambda row: row["_step"]) if stream == HISTORY else own) + out
            base = self.bases.get(attempt)
            if base is None:
                return out
            attempt, limits = base.attempt, base.counts.get(stream, {})

    def hides(self, attempt: int, stream: str, writer: str) -> bool:
        """Whether a writer of `attempt` is past what can be live; always, when nothing of that attempt is in the view."""
        at, limits = self.current, None
        while at != attempt:
            base = self.bases.get(at)
            if base is None:
                return True
            at, limits = base.attempt, base.counts
        return limits is not None and len(self.sequence(attempt, "", stream, writer)) > limits.get(stream, {}).get(writer, 0)

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for row in self.view(self.current, HISTORY):
            out |= {key: value for key, value in row.items() if value is not None}
        return out


class StoreMachine(RuleBasedStateMachine):
    """Drives store and model; the values of a line say where it belongs, so a mix-up shows."""

    @initialize()
    def open(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="wbdist-model-"))
        self.store = open_store(f"sqlite:///{self.place / 'store.db'}")
        StoredRun(self.store, "other")
        self.run = StoredRun(self.store)
        self.model = Model()
        self.serial = 0
        self.version = self.run.row.version

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.check_archive()
        self.store.close()
        shutil.rmtree(self.place)

    @rule(skip=st.integers(0, 2), data=st.data())
    def begin(self, skip: int, data: st.DataObject) -> None:
        """The next attempt, or one further on, on any older one; lines below the base may not have come yet."""
        attempt = self.model.current + 1 + skip
        older = data.draw(st.integers(0, attempt - 1))
        base = None
        if older:
            counts = {stream: {writer: data.draw(st.integers(0, 9)) for writer in WRITERS} for stream in STREAMS}
            base = Watermark(older, counts, 0)
        assert self.run.begin(attempt, base).accepted
        self.model.bases[attempt] = base
        self.model.begun.append(attempt)
        self.model.current = attempt

    @precondition(lambda self: any(n not in self.model.begun for n in range(1, self.model.current)))
    @rule(data=st.data())
    def begin_late(self, data: st.DataObject) -> None:
        """An attempt that was passed over says now on what it was built."""
        attempt = data.draw(st.sampled_from([n for n in range(1, self.model.current) if n not in self.model.begun]))
        older = data.draw(st.integers(0, attempt - 1))
        base = Watermark(older, {s: dict.fromkeys(WRITERS, data.draw(st.integers(0, 9))) for s in STREAMS}) if older else None
        self.run.begin(attempt, base)
        self.model.bases[attempt] = base
        self.model.begun.append(attempt)

    @precondition(lambda self: self.model.begun)
    @rule(data=st.data(), nonce=st.sampled_from([None, RIVAL]))
    def begin_again(self, data: st.DataObject, nonce: str | None) -> None:
        """A repeat of a known attempt, and a rival that wants its number: nothing changes."""
        attempt = data.draw(st.sampled_from(self.model.begun))
        done = self.run.begin(attempt, self.model.bases[attempt], nonce=nonce)
        if nonce == RIVAL:
            assert not done.accepted
        assert done.attempt == self.model.current
        assert self.run.row.version == self.version

    @precondition(lambda self: self.model.begun)
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
        attempt = data.draw(st.sampled_from([*self.model.begun, self.model.current, self.model.current]))
        if attempt not in self.model.begun:
            return
        known = self.model.sequence(attempt, lane, stream, writer)
        start = max(0, len(known) + offset)
        lines = [self.line(stream, attempt, lane, writer) for _ in range(count)]
        done = self.run.append(attempt, start, lines, stream=stream, nonce=lane or None, writer=writer)
        if start > len(known):
            assert (done.code, done.next) == ("gap", {stream: len(known)})
            return
        new = lines[len(known) - start :]
        known += new
        assert done.next == {stream: len(known)}
        assert done.code == ("fenced" if lane or self.model.hides(attempt, stream, writer) else "")
        version = self.run.row.version
        assert version > self.version if new else version == self.version

    def line(self, stream: str, attempt: int, lane: str, writer: str) -> Any:
        self.serial += 1
        if stream == CONSOLE:
            return f"{attempt}{lane}{writer}{self.serial}"
        row = {"_step": self.serial} if stream == HISTORY else {}
        return row | {"n": self.serial, f"at{attempt}": float(self.serial), "who": lane + writer}

    @rule()
    def reopen(self) -> None:
        """A restart of the server."""
        self.check_archive()
        self.store.close()
        self.store = open_store(f"sqlite:///{self.place / 'store.db'}")
        self.run = StoredRun.__new__(StoredRun)
        self.run.store = self.store
        found = self.store.get_run("e", "p", "r")
        assert found is not None
        self.run.pk = found.pk

    @invariant()
    def live_view_and_archive_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        model, row = self.model, self.run.row
        assert row.version >= self.version
        self.version = row.version
        live = {stream: model.view(model.current, stream) for stream in STREAMS}
        assert self.run.history() == live[HISTORY]
        assert self.run.history(stream=EVENTS) == live[EVENTS]
        assert self.store.console(self.run.pk) == live[CONSOLE]
        assert {s: n for s, n in row.line_counts.items() if n} == {s: len(lines) for s, lines in live.items() if lines}
        assert row.last_step == max((r["_step"] for r in live[HISTORY]), default=-1)
        assert row.metrics == sorted({k for r in live[HISTORY] for k in r if k not in {"_step", "who"}})
        assert row.summary == model.summary()
        assert self.store.history_tail(self.run.pk, HISTORY) == (live[HISTORY][-1] if live[HISTORY] else None)
        assert [(b.lo, b.last) for b in self.store.series(self.run.pk, "n", buckets=10_000)] == sorted(
            (r["_step"], float(r["n"])) for r in live[HISTORY]
        )

    def check_archive(self) -> None:
        """Everything ever accepted can be read: each attempt's view, each rival's lines."""
        model = self.model
        written = {a.attempt: a.rows for a in self.store.attempts(self.run.pk)}
        for attempt in model.begun:
            assert self.run.history(attempt=attempt) == model.view(attempt, HISTORY)
            rival = [line for writer in WRITERS for line in model.sequence(attempt, RIVAL, HISTORY, writer)]
            assert self.run.history(attempt=attempt, nonce=RIVAL) == sorted(rival, key=lambda r: r["_step"])
            assert written[attempt] == sum(len(model.sequence(attempt, "", HISTORY, w)) for w in WRITERS)


@pytest.mark.usefixtures("tiny")
def test_the_store_agrees_with_the_model() -> None:
    """After every step: live view, archive, counts, summary, metrics, charts and versions are the model's."""
    quick = [Phase.explicit, Phase.generate, Phase.shrink]  # explaining a failure traces every line of the store
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(max_examples=10, stateful_step_count=25, deadline=None, phases=quick, suppress_health_check=quiet),
    )
