"""What is in a journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wbdist.core.rows import RowAssembler
from wbdist.run.journal import JournalReader, Kind, Record


def read_all(path: Path) -> list[Record]:
    """Every record that is whole."""
    with JournalReader.open(path) as reader:
        found: list[Record] = []
        while records := reader.read():
            found += records
        return found


def records_of(path: Path, kind: Kind) -> list[dict[str, Any]]:
    """What the records of `kind` say."""
    return [record.data for record in read_all(path) if record.kind is kind]


def assembled(reader: JournalReader) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """From where `reader` stands: the history rows, as the shipper makes them, and those that are still open at the end."""
    header = reader.header
    assembler = RowAssembler(starting_step=header.starting_step, created=header.created, runtime=header.runtime)
    rows = []
    while records := reader.read():
        for record in records:
            if record.kind is Kind.ROW:
                rows += assembler.add(record.data, record.step, record.commit, record.time)
            elif record.kind in {Kind.COMMIT, Kind.END}:
                rows += assembler.close()
    return rows, assembler.close()


def history_of(path: Path) -> list[dict[str, Any]]:
    """The history rows that are closed."""
    with JournalReader.open(path) as reader:
        return assembled(reader)[0]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The same without times."""
    return [{key: value for key, value in row.items() if key not in {"_timestamp", "_runtime"}} for row in history_of(path)]
