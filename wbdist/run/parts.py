"""Parts of a run: other processes of this machine that write rows of a run which one process has opened.

A part is a writer of the same attempt with a journal of its own in the run's directory. It says nothing of what the run is:
config, name, state and end are the opener's, also when the part is killed. The server merges the writers' rows by step.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from wbdist.errors import UsageError
from wbdist.run import lifecycle, machine
from wbdist.run.handle import Run
from wbdist.run.journal import JournalHeader, JournalWriter, Kind, journal_name
from wbdist.run.lifecycle import RunSpec
from wbdist.run.shipping import Shipping


class Part(msgspec.Struct, frozen=True):
    """What another process needs to write rows of a run. Can be pickled."""

    spec: RunSpec
    header: JournalHeader | None
    """None for a disabled run."""
    directory: Path
    api_key: str | None


def part_of(run: Run) -> Part:
    """Of a run that this process has open. Raises UsageError for one that feeds an aggregator, which knows its ranks."""
    spec = run._spec  # noqa: SLF001
    if spec.role == "feed":
        raise UsageError(
            f"run {run.id} is one rank's part of a run of several ranks (strategy rank0): other processes cannot log to it; "
            'give them runs of their own (runs="task" or "worker")'
        )
    spec = msgspec.structs.replace(
        spec, config={}, metrics=(), earlier=(), resume="", branch=None, auto_resume=False, must_be_new=False, sample="process"
    )
    journal, shipping = run.journal, run._shipping  # noqa: SLF001
    if not isinstance(journal, JournalWriter):
        return Part(spec, None, Path(), None)
    return Part(spec, journal.header, journal.path.parent.absolute(), shipping.api_key if shipping is not None else None)


def open_part(part: Part, writer: str, label: str) -> Run:
    """Opens this process's part; some milliseconds, waits for no server. The caller finishes it (as does the process's end).

    `writer` must be unlike all other writers of the attempt; `label` stands before its console lines and behind its system
    metrics. Raises UsageError, JournalError as `open_run`.
    """
    settings = msgspec.structs.replace(part.spec.settings, x_label=label, x_primary=False, x_update_finish_state=False)
    spec = msgspec.structs.replace(part.spec, settings=settings, writer=writer)
    if part.header is None:
        return lifecycle.open_run(spec)
    header = msgspec.structs.replace(
        part.header, writer=writer, primary=False, host=settings.host or machine.host(), pid=os.getpid()
    )
    journal = JournalWriter.create(part.directory / journal_name(writer, header.attempt), header)
    shipping = None
    if header.online:
        shipping = Shipping(part.directory.parent, journal.path, header.base_url, part.api_key)
    run = Run(spec, journal=journal, shipping=shipping, directory=part.directory, opened_at=header.created)
    journal.append(Kind.CONFIG, {"set": {"_wandb": {"e": {writer: machine.environment()}}}})
    if shipping is not None:
        lifecycle.start_shipping(shipping, run, spec)
    if spec.capture_console:
        run.capture_console()
    if spec.sample != "nothing" and not settings.x_disable_stats:
        run.sample_system()
    return lifecycle.enlist(run)
