"""Batches handed out only once the one behind is here, too; so that nobody waits for data in the middle of a step.

Theory. Ranks meet in each step (gradients are summed there), so no rank is further than one step ahead of another. A
rank that begins a step without its batch lets the others wait in that step for as long as its data takes, and told to
stop they could neither finish the step nor leave it. A rank that begins a step with the next step's batch in its hand does
not: while it waits for the batch behind that one, the others are at most in the step for which it has the batch, and when
told to stop it goes there with them at once. This costs the memory of one batch, and no time: a wait for data comes one step
earlier, not in addition. Where only every n-th batch may be the last, n are held behind the next: a rank that ends such a
group then has the next one whole.

Only for worker processes. Without them a batch is made by the thread that trains: it cannot be told anything meanwhile, and
what it draws from the global generators must come after the step before, or a resumed job would draw otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

SLICE = 0.1
"""Seconds of one wait for a worker; between two the caller may be told to stop. Where data is on time, none ends."""

Arrival = tuple[Callable[[], None], Any]
"""What to call when the batch is handed out, and the batch."""


class LookAhead:
    """Iterates over batches; `wait` before each `next`. One thread."""

    def __init__(self, arriving: Iterator[Arrival | None], at_end: Callable[[], None], ahead: int) -> None:
        """`arriving` gives a batch, or None whenever SLICE seconds have brought none; `at_end` is called when one is asked for
        after the last. `ahead`: how many batches behind the next one `wait` waits for; 0: it waits for none."""
        self._arriving, self._at_end = arriving, at_end
        self._ahead = ahead
        self._held: deque[Arrival] = deque()
        self._failure: Exception | None = None
        self._over = False

    @property
    def looks_ahead(self) -> bool:
        """Whether batches are held ahead."""
        return self._ahead > 0

    def wait(self, told: Callable[[], bool]) -> bool:
        """True when the next batch and those behind it are here, or all that are left; False when `told`, which is asked every
        SLICE seconds of waiting, has cut that short. At once where batches are not held ahead."""
        while self._ahead and len(self._held) <= self._ahead and not self._over:
            if told():
                return False
            self._look()
        return True

    def __iter__(self) -> LookAhead:
        return self

    def __next__(self) -> Any:
        """The next batch, waited for when it is not here. What its making raised is raised in its turn, not before."""
        while not self._held and not self._over:
            self._look()
        if not self._held:
            if self._failure is not None:
                raise self._failure
            self._at_end()
            raise StopIteration
        hand_out, batch = self._held.popleft()
        hand_out()
        return batch

    def _look(self) -> None:
        try:
            arrival = next(self._arriving)
        except StopIteration:
            self._over = True
        except Exception as error:  # noqa: BLE001  (raised by __next__)
            self._failure, self._over = error, True
        else:
            if arrival is not None:
                self._held.append(arrival)
