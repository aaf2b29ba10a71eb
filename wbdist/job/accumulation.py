"""Several batches that make one optimizer step together: where in such a group the loop is.

A checkpoint within a group would count samples as used whose gradients it does not hold. So between the batches of a group
nothing is saved and nobody stops. A checkpoint always lies between two groups, which is why it holds no place within one.
"""

from __future__ import annotations

from wbdist.errors import UsageError


class Group:
    """Counts batches into groups of `size`; the last of an epoch may be smaller. The same on all ranks, which are in step."""

    def __init__(self, size: int = 1) -> None:
        """Raises UsageError for a size that is none."""
        if type(size) is not int or size < 1:
            raise UsageError(
                f"accumulate={size!r} is not understood; give the number of batches to one optimizer step, 1 or more"
            )
        self._size = size
        self._taken = 0
        self.save_is_due = ""
        """Why, since some batch of the group that is open; '' when none is."""

    def take(self, left: int) -> None:
        """One more batch is trained on, after which the epoch has `left`."""
        self._taken += 1
        if self._taken == self._size or left == 0:
            self._taken = 0

    @property
    def open(self) -> bool:
        """Whether batches were taken whose optimizer step comes with a later one."""
        return self._taken > 0
