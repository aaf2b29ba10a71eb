"""Stops at random moments: light ones with ranks as threads over a real c10d store, whole jobs with `make test-all`."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from preemption import stop_trials

from wbdist.core.coordination import Coordinator
from wbdist.distributed.coordination import StoreCoordinator
from wbdist.job.stopping import Stopping
from wbdist.preemption.budget import SaveCosts
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice

SAVE_EVERY, EVAL_EVERY = 4, 3
PHASES = ("train", "eval", "wait", "save")


@pytest.fixture(scope="module")
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)


def light_trial(store: Any, number: int, world: int) -> list[tuple[Any, ...]]:
    """One job of `world` threads: steps, evaluations, waits and saves, each a unit or a part of one, with a barrier where
    DDP has a collective. By rank: where it stopped, what it had evaluated, how often advised, and the plan."""
    rng = random.Random(f"light {number} {world}")
    prefixed = dist.PrefixStore(f"trial{number}.{world}", store)
    peers: list[Coordinator] = [StoreCoordinator(prefixed.clone(), rank, world, "light") for rank in range(world)]
    hubs = [NoticeHub([]) for _ in range(world)]
    barrier = threading.Barrier(world)
    told = {rank: (rng.choice(PHASES), rng.randrange(1, 8)) for rank in rng.sample(range(world), rng.choice([1, 1, 2, world]))}
    advised = {rng.randrange(world): rng.randrange(5)} if rng.random() < 0.4 else {}
    pace = [rng.choice([0.0, 0.0005, 0.002]) for _ in range(world)]
    found: dict[int, tuple[Any, ...]] = {}

    def rank_main(rank: int) -> None:
        stopping = Stopping(peers[rank], hubs[rank])
        step = evaluated = advice = 0

        def at(phase: str) -> None:
            if (wanted := told.get(rank)) is not None and phase == wanted[0] and step >= wanted[1]:
                del told[rank]
                notice = Notice("test", f"in {phase}", time.monotonic(), time.time() + rng.choice([60, 90]))
                threading.Thread(target=hubs[rank].tell, args=(notice,), daemon=True).start()

        while stopping.may_go_on():
            if stopping.advised:
                stopping.advised, advice = False, advice + 1
                barrier.wait(30)
            at("wait")
            time.sleep(pace[rank])
            barrier.wait(30)
            if advised.get(rank) == step:
                hubs[rank].tell(Notice("test", "maybe", time.monotonic(), advice=True))
            at("train")
            if step % EVAL_EVERY == 0:
                for _ in range(3):
                    if not stopping.may_go_on():
                        break
                    at("eval")
                    evaluated += 1
                    barrier.wait(30)
            step += 1
            if step % SAVE_EVERY == 0:
                at("save")
                barrier.wait(30)
        stopping.check()
        plan = stopping.agree(SaveCosts(), saving=None, committed=step, timeout=30.0)
        stopping.close()
        found[rank] = (step, evaluated, advice, plan)

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for peer in peers:
        peer.close()
    assert len(found) == world, f"only ranks {sorted(found)} of {world} stopped"
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize(("world", "count"), [(2, 20), (4, 10)])
def test_thirty_random_stops(world: int, count: int, store: Any) -> None:
    """Proves on 30 random schedules, over torch's TCPStore, that a notice to random ranks in the middle of steps,
    evaluations, waits for data and saves, after advice or not, ends all ranks at the same step and batch with the same plan."""
    for number in range(count):
        ends = light_trial(store, number, world)
        assert len(set(ends)) == 1, f"trial {number}: {ends}"
        assert ends[0][3].act == "save"


def test_a_rank_without_its_batch_lets_nobody_begin_the_step(store: Any) -> None:
    """Proves that ranks which meet before a step wait for one that was told to stop before its batch came, until they are told
    too: they began the step, and waited for that rank in it for good."""
    prefixed = dist.PrefixStore("meeting", store)
    hubs = [NoticeHub([]) for _ in range(2)]
    ranks = [Stopping(StoreCoordinator(prefixed.clone(), rank, 2, "meeting"), hub) for rank, hub in enumerate(hubs)]
    told: list[bool] = []

    def meets() -> None:
        ranks[0].meet("data", ready=True)
        told.append(ranks[0].told())

    other = threading.Thread(target=meets, daemon=True)
    other.start()
    hubs[1].tell(Notice("test", "now", time.monotonic()))
    ranks[1].meet("data", ready=False)
    other.join(60)
    assert told == [True]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(Stopping.begin_unit, ranks)) == [False, False]
        list(pool.map(Stopping.close, ranks))


def test_advice_and_then_a_stop_while_a_rank_waits_for_data() -> None:
    """Proves that advice does not count a step as begun for which a rank has no batch: told to stop, that rank waited for its
    data, and the others for it in the step, for good. (A trial like those below: advice at step 4, no data after batch 6.)"""
    assert stop_trials.judge(2, stop_trials.run(2, seed=20261121, first=26, count=1)) == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_two_hundred_jobs_stop_together_and_go_on(world: int) -> None:
    """Proves on 67 whole jobs a world size, over gloo and real checkpoints, told by signals, files, clouds and deadlines while
    they train, evaluate, wait, save and commit: all ranks leave after the same step with 75; the next life begins there."""
    assert stop_trials.judge(world, stop_trials.run(world, seed=20, first=0, count=67)) == []
