"""Ends the runs that fell silent."""

from __future__ import annotations

import asyncio
import logging

from starlette.concurrency import run_in_threadpool

from wbdist.core.states import RunEvent
from wbdist.server.context import AppContext

_log = logging.getLogger(__name__)


def sweep(ctx: AppContext, started_at: float) -> int:
    """One pass: SILENCE for every live run not heard of for `silence_timeout`; how many there were.

    Until the server itself has listened for so long nothing counts as silence: clients could not have spoken before.
    """
    now = ctx.clock()
    if now - started_at < ctx.settings.silence_timeout:
        return 0
    silent = ctx.store.silent_runs(now - ctx.settings.silence_timeout)
    for pk in silent:
        ctx.store.record_event(pk, RunEvent.SILENCE, now)
    return len(silent)


async def watch(ctx: AppContext) -> None:
    """Sweeps until cancelled, often enough that a run ends at most a tenth of `silence_timeout` (or 30 s) late."""
    started_at = ctx.clock()
    pause = max(0.05, min(30.0, ctx.settings.silence_timeout / 10))
    while True:
        await asyncio.sleep(pause)
        try:
            await run_in_threadpool(sweep, ctx, started_at)
        except Exception:  # noqa: BLE001 - a full disk must not end the watch; the next pass tries again
            _log.exception("looking for silent runs failed; trying again in %.1f s", pause)
