"""One rank that logs rows and does as told: `rank.py ROOT RANK WORLD_SIZE '{"strategy", "steps", ...}'`. Prints JSON lines.

orders: strategy, steps; gate: {rank: step}: before that step wait for ROOT/open; kill_self: {rank: step}; silent: ranks that
log nothing; prints: print a line at the start of each step, and keep what is printed; drain: step to drain at the end (rank
order: all); base: a position to continue from; settings: more of them; config0: rank 0's config; refuse: ranks that cannot
open their run; late: a LatePolicy; hosts: each rank is on a host of its own; no_aggregator: it does not come up at the start;
junk: log what cannot be logged; nested: log a dict of sums, which has a key more from the second step on; alerts, pages:
{rank: step}: where it has an alert, and logs a page of HTML.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Never

import msgspec
from file_coordinator import FileCoordinator

from wbdist.core.position import RunPosition
from wbdist.distributed import channel, strategies
from wbdist.distributed.aggregator_process import AggregatorDownError, AggregatorProcess
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.lateness import LatePolicy
from wbdist.errors import CommError, UsageError
from wbdist.run.init import make_spec
from wbdist.run.lifecycle import active_runs
from wbdist.run.media.html import Html
from wbdist.settings import resolve


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def refuse(*_: object) -> Never:
    raise CommError("this rank is refused")


def no_aggregator(*_: object) -> Never:
    raise AggregatorDownError("it did not come up")


def main() -> None:
    root, rank, size, orders = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    identity = RankIdentity(rank=rank, world_size=size, local_rank=rank, local_world_size=size, source="test")
    if orders.get("hosts"):
        identity = RankIdentity(rank=rank, world_size=size, node_rank=rank, source="test")
        channel.this_machine = lambda: f"host{rank}"
    peers = FileCoordinator(root / "keys", rank, size)
    settings = resolve(
        {
            "mode": "offline",
            "root_dir": str(root),
            "project": "p",
            "run_id": "job",
            "console": "wrap" if orders.get("prints") else "off",
            "quiet": True,
        }
        | orders.get("settings", {})
    )
    spec = make_spec(settings, config=orders["config0"] if rank == 0 and "config0" in orders else {"lr": 0.5})
    base = orders.get("base")
    spec = msgspec.structs.replace(
        spec,
        nonce="n",
        name=orders.get("name"),
        attempt=orders.get("attempt", 1),
        base=None if base is None else msgspec.convert(base, RunPosition),
    )
    if rank in orders.get("refuse", []):
        strategies.open_run = refuse
    if orders.get("no_aggregator"):
        AggregatorProcess.start = no_aggregator
    try:
        runs = strategies.open_runs(
            orders["strategy"], identity, peers, spec, LatePolicy(**orders["late"]) if "late" in orders else None
        )
    except CommError as error:
        say(event="refused", rank=rank, error=str(error), open=len(active_runs()))
        return
    aggregator = getattr(runs, "_aggregator", None)
    say(
        event="open",
        rank=rank,
        run=runs.run.id,
        journal=str(runs.run.journal_path),
        aggregator=aggregator.pid if aggregator else 0,
        strategy=runs.strategy,
        lr=runs.run.config.lr,
        reason=runs.reason,
    )
    if orders.get("junk"):
        for given in ({"x": object()}, {1: 2.0}):
            try:
                runs.log(given, step=0)
            except TypeError as error:
                say(event="junk", rank=rank, error=str(error))
        for reduce in ("median", {"x": ["sum"]}, None):
            try:
                runs.log({"x": 1}, step=0, reduce=reduce)
            except UsageError as error:
                say(event="junk", rank=rank, error=str(error))
    if rank == 0:
        runs.run.summary["early"] = 1
    first = runs.run.starting_step
    gate = orders.get("gate", {}).get(str(rank))
    kill = orders.get("kill_self", {}).get(str(rank))
    for step in range(first, first + orders["steps"]):
        if step == gate:
            say(event="gate", rank=rank)
            wait_for(root / "open")
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if orders.get("prints"):
            print(f"at step {step}", flush=True)
        if step == orders.get("alerts", {}).get(str(rank)):
            runs.run.alert("odd", f"seen by {rank}")
        if step == orders.get("pages", {}).get(str(rank)):
            runs.log({f"page{rank}": Html(f"<p>{rank}</p>", inject=False)}, step=step)
            (root / f"notes{rank}").write_text("of this rank")
            runs.run.save(str(root / f"notes{rank}"), base_path=str(root))
        if rank not in orders.get("silent", []):
            runs.log({"loss": 0.1 * step + rank, "step_again": step}, step=step)
            runs.log({"count": rank + 1}, step=step, reduce="sum")
            runs.log({"lo": rank, "hi": rank, "who": rank}, step=step, reduce={"lo": "min", "hi": "max", "who": "per_rank"})
        if orders.get("nested"):
            runs.log({"val": {"a": 1} if step == first else {"a": 1, "b": 1}}, step=step, reduce="sum")
        runs.commit_row()
    if rank == 0:
        runs.run.summary["weights"] = "abc"
    if "drain" in orders:
        try:
            position = runs.drain(orders["drain"], orders.get("drain_timeout", 20))
            say(event="drained", rank=rank, position=msgspec.to_builtins(position))
        except Exception as error:  # noqa: BLE001
            say(event="drained", rank=rank, error=f"{type(error).__name__}: {error}")
    runs.finish(orders.get("exit", {}).get(str(rank), 0))
    say(event="finished", rank=rank)


if __name__ == "__main__":
    main()
