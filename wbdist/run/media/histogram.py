"""`Histogram`: how values are distributed, in the row itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wbdist.errors import UsageError

MAX_BINS = 512
ROW_BINS = 32
"""Of arrays that are logged as they are."""


class Histogram:
    """Counts of values in bins of equal width. `sequence`: numbers, an array or a tensor of any shape (numpy is needed then);
    NaN and infinities are left out. `np_histogram`: what `numpy.histogram` returns, instead.

    `histogram` are the counts, `bins` the edges, one more. Raises UsageError for more than 512 bins and edges that do not fit.
    """

    def __init__(self, sequence: Any = None, np_histogram: tuple[Any, Any] | None = None, num_bins: int = 64) -> None:
        if not 1 <= num_bins <= MAX_BINS:
            raise UsageError(f"Histogram(num_bins={num_bins}): from 1 to {MAX_BINS} bins")
        if np_histogram is not None:
            if len(np_histogram) != 2:
                raise UsageError("Histogram(np_histogram=...) takes what numpy.histogram returns: (counts, edges)")
            counts, edges = np_histogram
        elif sequence is not None:
            counts, edges = _count(sequence, num_bins)
        else:
            raise UsageError("Histogram() needs values: Histogram(sequence) or Histogram(np_histogram=(counts, edges))")
        self.histogram: list[float] = _listed(counts)
        self.bins: list[float] = _listed(edges)
        if len(self.histogram) > MAX_BINS:
            raise UsageError(f"a histogram has at most {MAX_BINS} bins, this one {len(self.histogram)}")
        if len(self.bins) != len(self.histogram) + 1:
            raise UsageError(f"a histogram of {len(self.histogram)} counts has one edge more, not {len(self.bins)} edges")

    def to_json(self) -> dict[str, Any]:
        return {"_type": "histogram", "values": self.histogram, "bins": self.bins}

    def __repr__(self) -> str:
        return f"Histogram({len(self.histogram)} bins from {self.bins[0]:g} to {self.bins[-1]:g})"


def as_array(values: Any) -> Any:
    """A numpy array of numbers, lists, arrays and tensors (of bfloat16 too, and on any device)."""
    import numpy as np

    if callable(detach := getattr(values, "detach", None)):
        values = detach().cpu()
        if "bfloat16" in str(values.dtype):
            values = values.float()
        values = values.numpy()
    return np.asarray(values)


def _count(values: Any, num_bins: int) -> tuple[Any, Any]:
    import numpy as np

    flat = as_array(values).ravel()
    if flat.dtype.kind not in "fiub":
        raise UsageError(f"Histogram() takes numbers, not {flat.dtype}")
    flat = flat.astype(np.float64, copy=False)
    return np.histogram(flat[np.isfinite(flat)], bins=num_bins)


def _listed(values: Sequence[Any] | Any) -> list[float]:
    return list(values.tolist() if hasattr(values, "tolist") else values)
