"""What every strategy gives a rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from wbdist.core.position import RunPosition
from wbdist.core.reducers import DEFAULT
from wbdist.core.tails import JournalPrefix
from wbdist.run.handle import Run
from wbdist.run.reductions import check_operation
from wbdist.run.shipper.client import Standing


class RankRun(Protocol):
    """This rank's part in the job's runs. All methods exist under every strategy, with the same checks."""

    run: Run
    """This rank's handle. Under rank0 its rows feed the one run; of config, summary and the rest, rank 0's count."""
    group: str
    strategy: str
    """`rank0`, `per_rank`, `shared`, `rank_zero_only` or `plain`."""
    reason: str
    """Why it is this strategy, for people."""

    def log(self, data: Mapping[str, Any], step: int | None = None, reduce: str | Mapping[str, str] = DEFAULT) -> None:
        """Any rank, any thread, not in step: adds to the row of `step`, as `Run.log`. On disk when it returns; never waits.

        `reduce`: what becomes of the ranks' values under rank0, for all keys of this call or by key (the others: "mean");
        see core/reducers.py. Checked, and without effect, where a rank has a row of its own. Raises UsageError.
        """
        ...

    def commit_row(self) -> None:
        """Any rank, not in step: this rank adds nothing more to the open row."""
        ...

    def drain(self, step: int, timeout: float) -> RunPosition:
        """All ranks, each `step` once and in growing order, on one thread (which need not be the training thread).

        Returns when every row of a step <= `step`, of all ranks, is in the run's journal and fsynced. The position is the
        one after `step`, whatever was logged meanwhile, and under rank0 the same on all ranks.

        Rows up to `step` must be committed before. Blocks at most `timeout` seconds. Raises PeerLostError naming lost ranks,
        DeadlineError, EnvironmentFault.
        """
        ...

    def tail(self) -> list[JournalPrefix]:
        """Any rank, after `drain` and on its thread: what a checkpoint at the drained step must take along of the history,
        since the server has not acknowledged it. Blocks and raises as `Tail.of` does."""
        ...

    def standing(self) -> Standing:
        """Any rank, any thread: what the server said about another job that has the run, or about a person who wants it
        stopped; nothing on a rank that does not speak to it. Asks the shipper; at most a second."""
        ...

    def finish(self, exit_code: int | None = None) -> None:
        """All ranks, not in step: ends this rank's part, and with the last one the run. Blocks at most about
        `settings.finish_timeout` + 15 s (rank 0 under rank0: it waits for its peers), usually some milliseconds. Idempotent."""
        ...


def check_reduce(reduce: str | Mapping[str, str]) -> None:
    for key, op in reduce.items() if isinstance(reduce, Mapping) else [("", reduce)]:
        check_operation(op, f"reduce={op!r}" + (f" for {key!r}" if key else ""))
