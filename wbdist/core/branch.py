"""The one form in which a point of a run's history is written: `<run id>?_step=<number>`."""

from __future__ import annotations

import math
import re

import msgspec

EXAMPLE = "b3xk2m9q?_step=200"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_IMMUTABLE = re.compile(r"(?P<run>.+):(?P<attempt>[0-9]+)")


class BranchPoint(msgspec.Struct, frozen=True):
    """A step of a run, inclusive."""

    source: str
    """The run's id, or the immutable id `<run id>:<attempt>` of one of its incarnations."""
    step: int

    @property
    def run_id(self) -> str:
        """The source's run id, without the incarnation."""
        return split_immutable(self.source)[0]


def split_immutable(source: str) -> tuple[str, int | None]:
    """(run id, attempt) of an immutable id; attempt is None for a plain run id."""
    found = _IMMUTABLE.fullmatch(source)
    return (source, None) if found is None else (found["run"], int(found["attempt"]))


def parse(text: str) -> BranchPoint:
    """Raises ValueError saying what is wrong, what is expected, and an example. `2.9` means up to step 2, as in W&B."""
    source, mark, query = text.partition("?")
    key, equals, value = query.partition("=")
    wrong = ""
    if "#" in text:
        wrong = "it has a fragment (#)"
    elif not mark or not equals:
        wrong = "it has no ?_step=<number>"
    elif not source:
        wrong = "it names no run"
    elif "/" in source:
        wrong = "it has a path; only runs of the same entity and project can be named, by their id alone"
    elif "&" in query:
        wrong = "it has more than one condition"
    elif key != "_step":
        wrong = f"{key!r} is not _step, the only axis that always grows"
    elif _NUMBER.fullmatch(value) is None or not math.isfinite(float(value)):
        wrong = f"{value!r} is not a number of 0 or more"
    if wrong:
        raise ValueError(f"{text!r} is not a point of a run: {wrong}. Expected <run id>?_step=<number>, for example {EXAMPLE}")
    return BranchPoint(source, int(float(value)) if "." in value or "e" in value.lower() else int(value))
