"""The grammar of a branch point: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wbdist.core.branch import BranchPoint, parse, split_immutable

ids = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=64)


@given(ids, st.one_of(st.none(), st.integers(0, 10**9)), st.integers(0, 2**62))
def test_what_is_written_is_read_back(run_id: str, attempt: int | None, step: int) -> None:
    """Proves that every id, plain or immutable, and every step come out exactly as they went in."""
    source = run_id if attempt is None else f"{run_id}:{attempt}"
    point = parse(f"{source}?_step={step}")
    assert point == BranchPoint(source, step)
    assert split_immutable(source) == (run_id, attempt)
    assert point.run_id == run_id


@given(st.integers(0, 10**6), st.integers(0, 999))
def test_fractions_are_cut_off(step: int, thousandths: int) -> None:
    """Proves W&B's rule: 2.9 is up to step 2, so that the next step is 3."""
    assert parse(f"r?_step={step}.{thousandths:03}").step == step


@given(st.text(max_size=40))
@example("r")
@example("r?_step=")
@example("r?_step=-5")
@example("r?loss=3")
@example("r?_step=1&_step=2")
@example("e/p/r?_step=1")
@example("r?_step=1#x")
@example("?_step=1")
@example("r?_step=nan")
@example("r?_step=1e999")
@example("r?_step=" + "9" * 5000)
@example("r?_step=١")
def test_everything_else_is_refused(text: str) -> None:
    """Proves that any other text is a ValueError that quotes it and shows the form, whatever it holds."""
    if re.fullmatch(r"[^?#/]+\?_step=[0-9]+(\.[0-9]*)?", text) and len(text) < 1000:
        assert parse(text).step >= 0
        return
    with pytest.raises(ValueError, match="Expected <run id>") as refused:
        parse(text)
    assert repr(text) in str(refused.value)
