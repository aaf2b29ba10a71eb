"""Processes that outlive who started them, known by a directory in their command line."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil


def processes_of(place: Path, *words: str) -> list[psutil.Process]:
    """All but this one whose command line names `place`, or something below it, and has each of `words` for an argument."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or ()
        if process.pid != os.getpid() and str(place) in " ".join(line) and set(words) <= set(line):
            found.append(process)
    return found


def shippers_of(place: Path) -> list[psutil.Process]:
    return processes_of(place, "wbdist.run.shipper")


def kill_all(processes: list[psutil.Process]) -> None:
    """By SIGKILL; they are gone when it returns."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 60)
