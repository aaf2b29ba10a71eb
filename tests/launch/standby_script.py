"""A rank that imports torch and tells everything about its process; in its first attempt it waits for the standby, and ends as
told: `standby_script.py END [WAIT_FOR]`."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # what it spawns need not wait for it
    import torch

from wbdist.launch import intent
from wbdist.launch.standby import PER_START

RANK, RESTART = int(os.environ["RANK"]), int(os.environ["WBDIST_RESTART"])


def status(*names: str) -> list[str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return [line for line in lines if line.split(":")[0] in names]


def child(queue: object) -> None:
    queue.put([sys.argv, Path(sys.modules["__main__"].__file__).name])


def facts() -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    spawned = queue.get()
    process.join()
    queue.close()
    queue.join_thread()
    starts = (*PER_START, "MASTER_PORT")
    return {
        "main": [__name__, __file__, sys.modules["__main__"].__dict__ is globals(), __spec__ is None, __package__],
        "argv": [sys.argv, sys.orig_argv],
        "path": sys.path,
        "cwd": str(Path.cwd()),
        "umask": status("Umask"),
        "signals": status("SigBlk", "SigIgn", "SigCgt"),
        "threads": status("Threads"),
        "nice": os.nice(0),
        "leads its group": os.getpgid(0) == os.getpid(),
        "is the launcher's child": os.getppid() == int(os.environ["WBDIST_LAUNCHER_PID"]),
        "descriptors": {name: str(Path(f"/proc/self/fd/{name}").readlink()).split(":")[0] for name in ("0", "1", "2")},
        "environment": {name: value for name, value in os.environ.items() if name not in starts},
        "streams": [[s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty()] for s in (sys.stdout, sys.stderr)],
        "initialised": [torch.distributed.is_initialized(), torch.cuda.is_initialized()],
        "torch threads": torch.get_num_threads(),
        "spawned": spawned,
        "gc": __import__("gc").get_freeze_count(),
    }


def standby() -> str:
    """The pid of the standby that is ready, '' without one."""
    for entry in Path("/proc").glob("[0-9]*/comm"):
        try:
            if entry.read_text().strip() == "wbdist-standby":
                stat = (entry.parent / "stat").read_bytes()
                if int(stat.rpartition(b")")[2].split()[1]) == os.getppid():
                    return entry.parent.name
        except OSError:
            continue
    return ""


def main() -> None:
    end, *_ = sys.argv[1:]
    open_before = sorted(entry.name for entry in Path("/proc/self/fd").iterdir())
    told = {"own": [random.random(), multiprocessing.current_process().authkey.hex(), torch.rand(1).item()]}
    shown = dict(entry.partition("=")[::2] for entry in Path("/proc/self/environ").read_text().split("\0"))
    told |= {"shown": shown.get("RANK")}
    told |= {"comm": Path("/proc/self/comm").read_text().strip(), "open": open_before, "facts": facts()}
    Path(f"{RANK}.{RESTART}.tmp").write_text(json.dumps(told))
    Path(f"{RANK}.{RESTART}.tmp").rename(f"{RANK}.{RESTART}.json")
    if RESTART == 0:
        intent.write_progress(0)
        deadline = time.monotonic() + 90
        while not (found := standby()) and time.monotonic() < deadline:
            time.sleep(0.05)
        Path(f"{RANK}.standby").write_text(found)
        if end == "wait":
            time.sleep(120)
        if end == "kills-standby":
            os.kill(int(found), signal.SIGKILL)
        if end == "stops-standby":
            os.kill(int(found), signal.SIGSTOP)
        if RANK == 1 or end != "group":
            os.kill(os.getpid(), signal.SIGKILL)
    if end == "group":
        torch.distributed.init_process_group("gloo")
        value = torch.ones(1)
        torch.distributed.all_reduce(value)
        print("sum", value.item(), flush=True)
        torch.distributed.destroy_process_group()
    if end == "raises":
        raise ValueError("on purpose")
    if end == "exits":
        sys.exit("a message")
    if end == "hangs":
        Path(f"{RANK}.hangs").touch()
        time.sleep(120)


if __name__ == "__main__":
    main()
