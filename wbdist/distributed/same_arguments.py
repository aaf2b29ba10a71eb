"""Ranks that were given arguments by which they would not meet are told so, before they wait for each other in vain."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.distributed.coordination import name_ranks
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.strategies import choose
from wbdist.errors import UsageError


class _Given(msgspec.Struct):
    """One rank's."""

    strategy: str
    mode: str
    others: dict[str, str]


def check_same(
    peers: Coordinator,
    name: str,
    identity: RankIdentity,
    timeout: float,
    *,
    strategy: str,
    mode: str,
    others: Mapping[str, str] | None = None,
) -> None:
    """All ranks, in step, before anything is opened: returns when all of them mean the same strategy, and `others` are alike.

    `others`: more arguments that decide what ranks do in step, by name, as they are told. `name` is used once.
    Alone, nobody is asked. Blocks at most `timeout` seconds. Raises UsageError, the same on all ranks, that names two ranks (or
    more) and what each was given; PeerLostError.
    """
    if peers.world_size == 1:
        return
    own = _Given(str(strategy), mode, dict(others or {}))
    given = [msgspec.msgpack.decode(one, type=_Given) for one in peers.gather(name, msgspec.msgpack.encode(own), timeout)]
    meant = [_meant(rank, one, identity) for rank, one in enumerate(given)]
    odd = next((rank for rank, one in enumerate(meant) if one != meant[0]), None)
    if odd is None:
        return
    alike = [[rank for rank, one in enumerate(given) if one == given[which]] for which in (0, odd)]
    first, other = _words(given[0], given[odd])
    raise UsageError(
        f"{name_ranks(alike[0])} came with {first}, {name_ranks(alike[1])} with {other}: all ranks are given the same, since "
        "they wait for each other"
    )


def _meant(rank: int, given: _Given, identity: RankIdentity) -> dict[str, str]:
    try:
        return {"strategy": choose(given.strategy, identity, given.mode)[0], **given.others}
    except UsageError as error:
        raise UsageError(f"rank {rank}: {error}") from None


def _words(first: _Given, other: _Given) -> tuple[str, str]:
    """What each was given of that in which they differ."""
    both = [{"strategy": repr(one.strategy), "mode": repr(one.mode), **one.others} for one in (first, other)]
    differ = [key for key in both[0] if both[0][key] != both[1].get(key)]
    told = [", ".join(f"{key}={one.get(key)}" for key in differ) for one in both]
    return told[0], told[1]
