"""Client and server against a reference model: real journals, deliveries and app; everything in any order.

The model knows no watermarks, nonces or wires. A *life* is what one incarnation of an attempt wrote: what it was built on, as
a list of rows fixed when it began, and its own rows. The newest life that owns its attempt is what must be shown, once
everything has been delivered; before that, a part of it, and never anything else.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.inprocess import World

from wbdist.core.position import CONSOLE, EVENTS, HISTORY, Watermark
from wbdist.run.journal import JournalWriter, Kind
from wbdist.run.shipper.delivery import Delivery

Row = tuple[int, int]
"""Step, and a number that is no other row's."""


class Life:
    """One incarnation of an attempt of run `run_id`."""

    def __init__(self, run_id: str, attempt: int, nonce: str, inherited: list[Row], printed: list[str]) -> None:
        self.run_id, self.attempt, self.nonce = run_id, attempt, nonce
        self.inherited = inherited
        self.inherited_lines = printed
        self.lines: list[str] = []
        self.journals: list[JournalWriter] = []
        self.own: list[list[Row]] = []
        """By writer."""
        self.alive = True
        self.facts: dict[str, Any] = {}
        """Of the headers of its journals."""

    @property
    def step(self) -> int:
        """The last one."""
        return max((row[0] for row in self.rows), default=-1)

    @property
    def rows(self) -> list[Row]:
        return self.inherited + sorted(row for rows in self.own for row in rows)

    @property
    def console(self) -> list[str]:
        return self.inherited_lines + self.lines


class Histories(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="wbdist-histories-"))
        self.world = World(self.place)
        self.lives: list[Life] = []
        self.deliveries: dict[Path, Delivery] = {}
        self.owners: dict[tuple[str, int], str] = {}
        """(run, attempt) -> nonce, once the server has decided."""
        self.serial = 0
        self.add("r", 1, [], [])

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.deliver_all()
        finally:
            for delivery in self.deliveries.values():
                delivery.close()
            self.world.close()
            shutil.rmtree(self.place)

    # What jobs do ---------------------------------------------------------------------------------------

    def add(self, run_id: str, attempt: int, inherited: list[Row], printed: list[str], **facts: Any) -> Life:
        self.serial += 1
        life = Life(run_id, attempt, f"nonce{self.serial}", inherited, printed)
        life.facts = facts
        self.lives.append(life)
        self.attach(life)
        return life

    def attach(self, life: Life) -> None:
        writer = f"rank0.{len(life.journals)}" if life.journals else "rank0"
        journal = self.world.journal(life.attempt, run_id=life.run_id, writer=writer, nonce=life.nonce, **life.facts)
        journal.append(Kind.RUN, {"display_name": "model"}, self.world.now)
        life.journals.append(journal)
        life.own.append([])

    def living(self, data: st.DataObject) -> Life | None:
        found = [life for life in self.lives if life.alive]
        return data.draw(st.sampled_from(found), label="life") if found else None

    @rule(data=st.data(), skip=st.integers(1, 3), count=st.integers(1, 4))
    def log(self, data: st.DataObject, skip: int, count: int) -> None:
        """Any life that has not ended, zombies too."""
        if (life := self.living(data)) is None:
            return
        for _ in range(count):
            self.serial += 1
            row = (life.step + skip, self.serial)
            life.journals[-1].append_row(values_of(row), step=row[0], commit=True, time=self.world.now)
            life.own[-1].append(row)

    @rule(data=st.data())
    def print_line(self, data: st.DataObject) -> None:
        life = self.living(data)
        if life is None or len(life.journals) > 1:
            return  # the order of lines of several writers is the order of their names: not modelled
        self.serial += 1
        life.journals[-1].append(Kind.CONSOLE, {"text": f"line {self.serial}", "stream": "stdout"}, self.world.now)
        life.lines.append(f"line {self.serial}")

    @rule(data=st.data())
    def lose_a_writer(self, data: st.DataObject) -> None:
        """The aggregator is killed, and another one goes on."""
        life = self.living(data)
        if life is not None and len(life.journals) < 4:
            self.world.lose(life.journals[-1])
            self.attach(life)

    @rule(data=st.data(), killed=st.booleans(), code=st.sampled_from([0, 1, 75]))
    def end(self, data: st.DataObject, killed: bool, code: int) -> None:
        if (life := self.living(data)) is None:
            return
        life.alive = False
        if killed:
            self.world.lose(life.journals[-1])
        else:
            life.journals[-1].close(code)
            self.world.writers.remove(life.journals[-1])

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """The next attempt, from a checkpoint of any older one, that the server may know nothing of yet."""
        bases = [life for life in self.lives if life.run_id == "r" and self.sole(life)]
        if not bases:
            return
        base = data.draw(st.sampled_from(bases), label="base")
        steps = [row[0] for rows in base.own for row in rows]
        least = max((row[0] for row in base.inherited), default=-1)
        step = data.draw(st.sampled_from([least, *sorted(steps)]), label="step")
        counts = {
            journal.header.writer: sum(row[0] <= step for row in rows)
            for journal, rows in zip(base.journals, base.own, strict=True)
        }
        watermark = Watermark(base.attempt, {HISTORY: counts, CONSOLE: {"rank0": len(base.lines)}}, step)
        inherited = [row for row in base.rows if row[0] <= step]
        newest = max(life.attempt for life in self.lives if life.run_id == "r")
        summary: dict[str, Any] = {**summary_of(inherited), "_step": step}
        self.add("r", newest + 1, inherited, list(base.console), base=watermark, summary=summary)

    @rule(data=st.data())
    def requeue_twice(self, data: st.DataObject) -> None:
        """Another incarnation of the newest attempt, from the same checkpoint."""
        newest = max((life for life in self.lives if life.run_id == "r"), key=lambda life: life.attempt)
        if sum(life.attempt == newest.attempt and life.run_id == "r" for life in self.lives) < 3:
            self.add("r", newest.attempt, newest.inherited, newest.inherited_lines, **newest.facts)

    @rule(data=st.data(), fork=st.booleans())
    def branch(self, data: st.DataObject, fork: bool) -> None:
        """A rewind or a fork by step, which the server resolves: so it has to know everything."""
        self.deliver_all()
        shown = self.owner_of_view("r")
        if not shown.rows:
            return
        step = data.draw(st.sampled_from([row[0] for row in shown.rows]), label="step")
        facts = {"at_step": step, "base_run": "r" if fork else "", "fresh": (CONSOLE, EVENTS)}
        inherited = [row for row in shown.rows if row[0] <= step]
        attempt = 1 if fork else shown.attempt + 1
        life = self.add(f"fork{self.serial}" if fork else "r", attempt, inherited, [], **facts)
        self.deliver(life.journals[0])

    # What happens to requests and processes -------------------------------------------------------------

    @rule(data=st.data(), faults=st.lists(st.sampled_from(["", "drop", "drop-after", "twice"]), max_size=5))
    def ship(self, data: st.DataObject, faults: list[Any]) -> None:
        """Some steps of one delivery, over a bad network."""
        journal = data.draw(st.sampled_from([journal for life in self.lives for journal in life.journals]), label="journal")
        delivery = self.delivery_of(journal)
        self.world.fault = lambda: faults.pop() if faults else ""
        for _ in range(len(faults) + 1):
            delivery.step(self.world.now)
            self.world.now += 1.0
        self.world.fault = lambda: ""

    @rule()
    def kill_the_shipper(self) -> None:
        for delivery in self.deliveries.values():
            delivery.close()
        self.deliveries.clear()

    @rule()
    def restart_the_server(self) -> None:
        self.world.restart()

    @precondition(lambda self: bool(self.world.arrived))
    @rule(data=st.data())
    def repeat_requests(self, data: st.DataObject) -> None:
        """Requests of any age arrive once more."""
        before = self.dump()
        for _ in range(data.draw(st.integers(1, 3), label="count")):
            self.world.post(*data.draw(st.sampled_from(self.world.arrived), label="request"))
        assert self.dump() == before

    @rule(data=st.data())
    def sync(self, data: st.DataObject) -> None:
        """`wbdist sync` of some journals, in any order, some twice."""
        paths = [journal.path for life in self.lives for journal in life.journals]
        self.world.sync(data.draw(st.lists(st.sampled_from(paths), max_size=4), label="paths"))

    # What must hold -------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        return {
            run_id: (self.world.rows(run_id=run_id), self.world.console(run_id), run.attempt, run.summary, run.config)
            for run_id in {life.run_id for life in self.lives}
            if (run := self.world.run_called(run_id)) is not None
        }

    def sole(self, life: Life) -> bool:
        """Whether it owns its attempt for certain."""
        rivals = [other for other in self.lives if (other.run_id, other.attempt) == (life.run_id, life.attempt)]
        return len(rivals) == 1 or self.owners.get((life.run_id, life.attempt)) == life.nonce

    def owner_of_view(self, run_id: str) -> Life:
        """The life that the server shows."""
        run = self.world.run_called(run_id)
        assert run is not None
        nonce = self.owners[run_id, run.attempt]
        return next(life for life in self.lives if (life.run_id, life.nonce) == (run_id, nonce))

    def delivery_of(self, journal: JournalWriter) -> Delivery:
        if journal.path not in self.deliveries:
            self.deliveries[journal.path] = self.world.delivery(journal)
        return self.deliveries[journal.path]

    def deliver(self, journal: JournalWriter) -> None:
        delivery = self.delivery_of(journal)
        ticket = delivery.ask()
        for _ in range(400):  # seconds: more than the longest wait between two tries
            if delivery.finished or delivery.flushed >= ticket:
                break
            delivery.step(self.world.now)
            self.world.now += 1.0
        assert not delivery.trouble
        self.learn_owners()

    def deliver_all(self) -> None:
        """Everything arrives: then what is shown is exactly what must be."""
        for life in self.lives:
            for journal in life.journals:
                self.deliver(journal)
        for run_id in {life.run_id for life in self.lives}:
            life = self.owner_of_view(run_id)
            newest = max(other.attempt for other in self.lives if other.run_id == run_id)
            assert life.attempt == newest
            assert shown(self.world.rows(run_id=run_id)) == life.rows
            assert self.world.console(run_id) == life.console
            summary = self.world.run_called(run_id).summary  # type: ignore[union-attr]
            assert {key: value for key, value in summary.items() if not key.startswith("_")} == summary_of(life.rows)
        for life in self.lives:  # archive + live = everything
            owner = self.owners[life.run_id, life.attempt] == life.nonce
            rows = self.world.rows(life.attempt, None if owner else life.nonce, life.run_id)
            own = sorted(row for rows_of_writer in life.own for row in rows_of_writer)
            assert [row for row in shown(rows) if row not in life.inherited] == own

    @invariant()
    def nothing_else_is_shown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.learn_owners()
        for run_id in {life.run_id for life in self.lives}:
            if self.world.run_called(run_id) is None or not self.world.run_called(run_id).attempt:  # type: ignore[union-attr]
                continue
            life, rows = self.owner_of_view(run_id), shown(self.world.rows(run_id=run_id))
            assert len(rows) == len(set(rows)), "doubled"
            assert set(rows) <= set(life.rows), "stale"
            assert rows == sorted(rows), "out of order"
            assert set(self.world.console(run_id)) <= set(life.console), "stale lines"

    def learn_owners(self) -> None:
        """Who has an attempt keeps it."""
        for run_id in {life.run_id for life in self.lives}:
            run = self.world.run_called(run_id)
            for entry in self.world.ctx.store.attempts(run.pk) if run is not None else ():
                if entry.nonce:
                    assert self.owners.setdefault((run_id, entry.attempt), entry.nonce) == entry.nonce


def values_of(row: Row) -> dict[str, int]:
    """Not the same keys in each row."""
    return {"id": row[1], f"key{row[1] % 5}": row[1]}


def summary_of(rows: list[Row]) -> dict[str, int]:
    return {key: value for row in rows for key, value in values_of(row).items()}


def shown(rows: list[dict[str, Any]]) -> list[Row]:
    return [(row["_step"], row["id"]) for row in rows]


def check(examples: int, steps: int, *, shrink: bool = False) -> None:
    phases = [Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if shrink else [])]
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.timeout(600)
def test_history_is_the_models_whatever_happens() -> None:
    """Proves that what is shown is a part of the model's history at every moment, and all of it when everything has arrived."""
    check(6, 25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_history_is_the_models_whatever_happens_for_long() -> None:
    """The same, longer, with a minimal example of a failure."""
    check(300, 60, shrink=True)
