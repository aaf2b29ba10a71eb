"""One attempt of a run that logs for some time, online, in the working directory: `zombie.py WHO ATTEMPT SECONDS [BASE]`.

Leaves its position after 20 rows in `position.json`, as a checkpoint would.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from wbdist.core.position import RunPosition
from wbdist.run.init import make_spec
from wbdist.run.lifecycle import open_run
from wbdist.settings import resolve

who, attempt, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
base = msgspec.json.decode(Path(sys.argv[4]).read_bytes(), type=RunPosition) if len(sys.argv) > 4 else None
spec = make_spec(resolve({"project": "zombies", "run_id": "one", "console": "off", "x_disable_stats": True}))
spec = msgspec.structs.replace(spec, attempt=attempt, nonce=f"n{attempt}", base=base, must_be_new=False)
run = open_run(spec)
until = time.monotonic() + seconds
rows = 0
while time.monotonic() < until:
    run.log({"who": who, "at": run.step})
    rows += 1
    if rows == 20:
        run.flush(10.0)
        fresh = Path("position.json.new")
        fresh.write_bytes(msgspec.json.encode(run.position()))
        fresh.rename("position.json")
    time.sleep(0.02)
run.finish(0)
