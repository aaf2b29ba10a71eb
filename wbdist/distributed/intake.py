"""One feed's rows as the aggregator takes them: finished rows in the order of their steps, without a dict for each.

Nearly all rows of a job have one of a few layouts. Their values stay a tuple from the frame to the column that is reduced;
only what is uncommon (a key logged twice in a step, text, nested values) becomes a dict on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from wbdist.core.reducers import Columns, Ops, reduce_rows
from wbdist.core.rows import merge
from wbdist.run.journal import Kind, Schema
from wbdist.run.journal_format import KIND_AT, STEP_AT, TIME_AT, VALUES_AT


class Layout:
    """Keys and types that rows have in common; one object for all that are alike. Made by `Layouts`."""

    __slots__ = ("codes", "floats", "keys", "together")

    def __init__(self, keys: tuple[str, ...], codes: str) -> None:
        self.keys = keys
        self.codes = codes
        self.floats = not codes.strip("d")
        self.together: dict[Layout, Layout | None] = {}
        """What a row of this layout is when values of another are added; None: they have keys in common."""


class Layouts:
    """All layouts of one run's feeds."""

    def __init__(self) -> None:
        self._all: dict[tuple[tuple[str, ...], str], Layout] = {}

    def of(self, schema: Schema) -> Layout:
        return self._get(schema.keys, schema.codes)

    def together(self, first: Layout, second: Layout) -> Layout | None:
        """The layout of both one after the other; None when they have keys in common."""
        if second not in first.together:
            apart = set(first.keys).isdisjoint(second.keys)
            first.together[second] = self._get(first.keys + second.keys, first.codes + second.codes) if apart else None
        return first.together[second]

    def _get(self, keys: tuple[str, ...], codes: str) -> Layout:
        return self._all.setdefault((keys, codes), Layout(keys, codes))


class FeedOps:
    """A feed's ops from some row on, and how rows of a layout become one under them."""

    __slots__ = ("_columns", "of")

    def __init__(self, ops: Ops) -> None:
        self.of = ops
        self._columns: dict[Layout, Columns | None] = {}

    def columns(self, layout: Layout) -> Columns | None:
        try:
            return self._columns[layout]
        except KeyError:
            found = self._columns[layout] = Columns.of(layout.keys, self.of, floats=layout.floats)
            return found

    def after(self, changed: Ops) -> FeedOps:
        return FeedOps({**self.of, **changed})


class FeedRow(NamedTuple):
    """A finished row of one rank."""

    rank: int
    layout: Layout | None
    """None: `values` is a dict."""
    values: Any
    ops: FeedOps
    time: float

    def as_dict(self) -> dict[str, Any]:
        return self.values if self.layout is None else dict(zip(self.layout.keys, self.values, strict=True))


class FeedRows:
    """Puts one feed's `log` calls together to rows. The feed's writer has applied the step rule: no call goes back."""

    def __init__(self, rank: int, layouts: Layouts) -> None:
        self._rank = rank
        self._layouts = layouts
        self.ops = FeedOps({})
        """Of the rows that are logged from here on."""
        self.step: int | None = None
        """Of the open row, if there is one."""
        self._row: FeedRow | None = None

    def add(self, layout: Layout | None, values: Any, step: int, time: float) -> FeedRow | None:
        """One call's values for `step`: a tuple, or a dict without layout. The row of an earlier step, if that was open."""
        row = self._row
        if row is None or step != self.step:
            self._row, self.step = FeedRow(self._rank, layout, values, self.ops, time), step
            return row
        together = self._layouts.together(row.layout, layout) if row.layout is not None and layout is not None else None
        if together is not None:
            joined = row.values + values
        else:
            joined = dict(row.as_dict())
            more: Mapping[str, Any] = values if layout is None else dict(zip(layout.keys, values, strict=True))
            merge(joined, more)
        self._row = FeedRow(self._rank, together, joined, self.ops, time)
        return None

    def add_packed(self, layout: Layout, packed: list[tuple[Any, ...]], done: Callable[[int, FeedRow], None]) -> None:
        """The same for many calls of one layout; `done` is given each row that is finished, with its step."""
        row, at = self._row, self.step
        rank, ops, make = self._rank, self.ops, tuple.__new__
        for call in packed:
            step = call[STEP_AT]
            if row is None or step != at:
                if row is not None:
                    assert at is not None
                    done(at, row)
                # As FeedRow(...), in half the time.
                row, at = make(FeedRow, (rank, layout, call[VALUES_AT:], ops, call[TIME_AT])), step
            else:
                self._row, self.step = row, at
                self.add(layout, call[VALUES_AT:], step, call[TIME_AT])
                row = self._row
            if call[KIND_AT] == Kind.ROW_PACKED_COMMIT:
                done(step, row)
                row = at = None
        self._row, self.step = row, at

    def close(self) -> FeedRow | None:
        """The open row, which is complete now."""
        row, self._row, self.step = self._row, None, None
        return row


def reduced(rows: list[FeedRow]) -> dict[str, Any]:
    """One row of all ranks' rows of a step, at least one, in rank order: as `reduce_rows`."""
    layout = rows[0].layout
    if layout is not None and all(row.layout is layout for row in rows):
        columns = rows[0].ops.columns(layout)
        if columns is not None:
            return columns.reduce([row.values for row in rows])
    return reduce_rows([(row.rank, row.as_dict(), row.ops.of) for row in rows])
