"""Writers of one run that come and go: `writers.py FIRST COUNT SEED`, each a thread, online, in the working directory.

A writer attaches, logs some rows with steps of its own choosing, detaches, and comes back as another writer. `acks` gets one
line for each row whose `log` returned: writer, step, value.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time

import msgspec

from wbdist.run.init import make_spec
from wbdist.run.lifecycle import RunSpec, open_run
from wbdist.settings import resolve

LIVES = 3
ROWS = 12


def live(spec: RunSpec, number: int, rng: random.Random, acks: int) -> None:
    for life in range(rng.randint(1, LIVES)):
        writer = f"w{number}.{life}"
        run = open_run(msgspec.structs.replace(spec, writer=writer))
        step = rng.randrange(10)
        for _ in range(rng.randint(1, ROWS)):
            value = rng.randrange(1 << 40)
            run.log({writer: value}, step=step)
            run.commit_row()
            os.write(acks, f"{writer} {step} {value}\n".encode())
            step += rng.randint(1, 5)
            time.sleep(rng.random() * 0.1)
        run.finish(0)
        time.sleep(rng.random() * 0.2)


def main() -> None:
    first, count, seed = map(int, sys.argv[1:])
    settings = {"project": "many", "run_id": "one", "console": "off", "quiet": True, "x_disable_stats": True}
    spec = make_spec(resolve(settings))
    spec = msgspec.structs.replace(spec, attempt=1, nonce="together", must_be_new=False)
    acks = os.open("acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    threads = [
        threading.Thread(target=live, args=(spec, number, random.Random(f"{seed} {number}"), acks))
        for number in range(first, first + count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
