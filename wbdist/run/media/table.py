"""`Table`: rows and columns, kept as a JSON file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

from wbdist.errors import UsageError
from wbdist.protocol import jsonvalues
from wbdist.run.media.base import Media, Place
from wbdist.run.media.histogram import Histogram
from wbdist.run.values import plain_at

logger = logging.getLogger("wbdist.run")


class Table(Media):
    """Rows of values under named columns. `data`: a list of rows, a 2-d array or a pandas DataFrame; `dataframe`: the latter.

    A cell is what `log` takes, `Image` and `Histogram` included. At most MAX_ROWS rows are kept in a run's history, with a
    warning. Raises UsageError when a row has not one cell a column, TypeError for cells that cannot be kept.
    """

    MAX_ROWS: ClassVar[int] = 10_000

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        data: Any = None,
        rows: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        **ignored: Any,
    ) -> None:
        """`rows` is W&B's old name of `data`. Its other arguments say what cells may be; here they may be anything."""
        del ignored
        if dataframe is None and _is_frame(data):
            dataframe = data
        if dataframe is not None:
            columns = [str(name) for name in dataframe.columns]
            data = dataframe.itertuples(index=False, name=None)
        elif data is None:
            data = rows
        listed = [list(row) for row in (data.tolist() if hasattr(data, "tolist") else data or ())]
        default = ["Input", "Output", "Expected"]
        if columns is None and listed and len(listed[0]) != len(default):
            default = [f"col_{number}" for number in range(len(listed[0]))]
        self.columns: list[str] = [str(name) for name in (default if columns is None else columns)]
        self.data: list[list[Any]] = []
        for row in listed:
            self.add_data(*row)

    def add_data(self, *cells: Any) -> None:
        """Adds one row."""
        if len(cells) != len(self.columns):
            raise UsageError(
                f"the table has {len(self.columns)} columns ({', '.join(self.columns)}); this row has {len(cells)} values"
            )
        self.data.append(list(cells))

    add_row = add_data

    def add_column(self, name: str, data: Sequence[Any]) -> None:
        """Adds one column: a value for each row there is."""
        if name in self.columns:
            raise UsageError(f"the table has a column {name!r} already")
        values = list(data)
        if self.data and len(values) != len(self.data):
            raise UsageError(f"the table has {len(self.data)} rows; column {name!r} has {len(values)} values")
        rows = self.data or ([[] for _ in values] if not self.columns else [])
        if len(rows) != len(values):
            raise UsageError(f"column {name!r} has {len(values)} values, the table no rows")
        for row, value in zip(rows, values, strict=True):
            row.append(value)
        self.data = rows
        self.columns.append(str(name))

    def get_column(self, name: str) -> list[Any]:
        """The values of one column."""
        if name not in self.columns:
            raise UsageError(f"the table has no column {name!r}; it has {', '.join(self.columns)}")
        at = self.columns.index(name)
        return [row[at] for row in self.data]

    def record(self, place: Place) -> dict[str, Any]:
        if len(self.data) > self.MAX_ROWS:
            logger.warning("a table of %d rows: only the first %d are kept (Table.MAX_ROWS)", len(self.data), self.MAX_ROWS)
        rows = [[_cell(value, place) for value in row] for row in self.data[: self.MAX_ROWS]]
        content = jsonvalues.dumps({"columns": self.columns, "data": rows}).encode()
        found = place.put("table", ".table.json", content)
        return {"_type": "table-file", **found, "ncols": len(self.columns), "nrows": len(rows), "log_mode": "IMMUTABLE"}

    def __repr__(self) -> str:
        return f"Table({len(self.data)} rows of {', '.join(self.columns)})"


def _is_frame(data: Any) -> bool:
    return hasattr(data, "itertuples") and hasattr(data, "columns")


def _cell(value: Any, place: Place) -> Any:
    if isinstance(value, Media):
        return value.record(place)
    if isinstance(value, Histogram):
        return value.to_json()
    if type(value).__name__ in {"Timestamp", "datetime", "date", "Timedelta", "timedelta"}:
        return str(value)
    return plain_at("a table's cell", value)
