"""W&B's own client opens a run: which attempt that begins, in the words of its wire.

Its requests carry no attempt. So whatever opens a known run begins one for it: a resume upon everything that shows, a rewind
or fork up to the step, and an id used again without `resume` upon nothing, so that what was there is archived and never mixed
with what comes (a second `wandb sync` of one run is that too). An opening whose answer was lost is sent again: an attempt that
holds no line yet is the one that was asked for.
"""

from __future__ import annotations

import secrets

import msgspec
import sqlalchemy as sa

from wbdist.core.position import CONSOLE, EVENTS
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import attempts, branches
from wbdist.server.store.branches import Origin
from wbdist.server.store.interface import Opening
from wbdist.server.store.views import view_of

FRESH = (CONSOLE, EVENTS)
"""What W&B's client counts from 0 again after a rewind and in a fork."""
_WRITER = "sdk"


def request(db: sa.Connection, run: sa.RowMapping, opening: Opening, *, inserted: bool) -> BeginAttempt | None:
    """The attempt to begin; None when the run's current one will do."""
    pk, current = int(run["pk"]), int(run["attempt"])
    known = attempts.attempt_of(db, pk, current)
    origin = None if known is None or known["origin"] is None else msgspec.json.decode(known["origin"], type=Origin)
    empty = not any(any(by.values()) for by in view_of(db, pk, current).next_of(current).values())
    begin = BeginAttempt(current + 1, secrets.token_hex(8), _WRITER, cause=opening.kind)
    branch = msgspec.structs.replace(begin, base_run=opening.source, at_step=opening.step, fresh=FRESH)
    again = False
    match opening.kind:
        case "resume":
            again, begin = empty, msgspec.structs.replace(begin, base_run=run["run_id"])
        case "rewind":
            again = empty and origin is not None and (origin.kind, origin.asked) == ("rewind", opening.step)
            begin = branch
        case "fork":
            asked = ("fork", branches.find_source(db, run, branch).pk, opening.step)
            again = empty and origin is not None and (origin.kind, origin.run, origin.asked) == asked
            begin = branch
        case _:
            again = inserted or (empty and origin is None)
    return None if again else begin
