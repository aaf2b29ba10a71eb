"""Shipping journals once, in the foreground, with the shipper's own deliveries: what `wbdist sync` does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import msgspec

from wbdist.core.branch import split_immutable
from wbdist.errors import JournalCorruptError
from wbdist.run.journal import JournalHeader, JournalReader, writer_alive
from wbdist.run.shipper.delivery import Delivery, Pace, State
from wbdist.run.shipper.placing import first_step
from wbdist.run.shipper.remote import Remote

_LONGEST_NAP = 0.5

Name = tuple[str, str]
"""Project and id of a run."""


class Synced(msgspec.Struct, frozen=True):
    """What became of one journal. `outcome`: "complete" (its end included), "current" (its writer lives: everything so
    far), "fenced", "failed", "skipped"; `error` says why not."""

    journal: Path
    header: JournalHeader | None
    outcome: str
    error: str = ""
    sent_to: str = ""


class Wanted(msgspec.Struct, frozen=True):
    """What is to be sent, and under which names."""

    online: bool = True
    """Journals of online runs."""
    offline: bool = True
    console: bool = True
    """Printed lines."""
    names: dict[str, str] = {}
    """run_id, project, entity instead of the journals' own."""
    tags: dict[str, str] = {}
    """What to call some tags."""
    append: bool = False
    """A run that the server has, of another origin, goes on with these rows."""


def header_of(path: Path) -> JournalHeader | None:
    """None for a journal whose header does not verify."""
    try:
        with JournalReader.open(path) as reader:
            return reader.header
    except (JournalCorruptError, OSError):
        return None


def ship(
    journals: Sequence[Path],
    remote_for: Callable[[JournalHeader], Remote],
    timeout: float,
    log: logging.Logger,
    wanted: Wanted | None = None,
) -> Iterator[Synced]:
    """Delivers `journals`, a run's attempts in their order, forks behind their sources; yields each as it is done.

    Idempotent: lines the server has are not sent again. A server that stays away fails a journal after `timeout` seconds
    without progress. Raises what `remote_for` raises.
    """
    wanted = wanted or Wanted()
    found: list[tuple[Path, JournalHeader]] = []
    for path in journals:
        try:
            with JournalReader.open(path) as reader:
                found.append((path, reader.header))
        except (JournalCorruptError, OSError) as error:
            yield Synced(path, None, "failed", str(error))
    depths = _depths([header for _, header in found])
    found.sort(key=lambda pair: _order(pair[1], depths))
    places = _behind(found) if wanted.append else {}
    for path, header in found:
        if header.role == "feed":
            yield Synced(path, header, "skipped", "a rank's feed: its rows are in the journal of the run's aggregator")
            continue
        if not (wanted.online if header.online else wanted.offline):
            yield Synced(path, header, "skipped", "an online run" if header.online else "an offline run")
            continue
        yield _ship_one(path, header, remote_for(header), timeout=timeout, log=log, wanted=wanted, place=places.get(path, {}))


def _behind(found: Sequence[tuple[Path, JournalHeader]]) -> dict[Path, dict[str, Any]]:
    """For journals whose run began here: the facts of the header that let it go behind what the server has (`placing`)."""
    roots = {
        (header.project, header.run_id): (path, header)
        for path, header in found
        if header.attempt == 1 and header.base is None and header.at_step is None and not header.base_run
    }
    places: dict[Path, dict[str, Any]] = {}
    for path, header in found:
        first, root = roots.get((header.project, header.run_id), (path, None))
        if root is not None and header.behind is None:
            places[path] = {"behind": 0} if path == first else {"behind": first_step(first) or 0, "root": root.nonce}
    return places


def _order(header: JournalHeader, depths: dict[Name, int]) -> tuple[Any, ...]:
    name = (header.project, header.run_id)
    return depths[name], header.entity, *name, header.attempt, header.writer


def _depths(headers: Sequence[JournalHeader]) -> dict[Name, int]:
    """(project, run) -> how many forks lie below it: a server must have heard of what a run is built upon."""
    sources: dict[Name, set[Name]] = {}
    for header in headers:
        below = sources.setdefault((header.project, header.run_id), set())
        if header.base_run:
            below.add((header.project, split_immutable(header.base_run)[0]))

    def depth(name: Name, above: frozenset[Name]) -> int:
        above |= {name}
        return max((1 + depth(source, above) for source in sources.get(name, set()) - above), default=0)

    return {name: depth(name, frozenset()) for name in sources}


def _ship_one(
    path: Path,
    header: JournalHeader,
    remote: Remote,
    *,
    timeout: float,
    log: logging.Logger,
    wanted: Wanted,
    place: dict[str, Any],
) -> Synced:
    try:
        pace = Pace(poll=0.0, ours=0.0, foreign=0.0)
        delivery = Delivery(path, remote, log, pace, names=wanted.names | place, tags=wanted.tags, console=wanted.console)
    except (JournalCorruptError, OSError) as error:
        return Synced(path, header, "failed", str(error))
    try:
        ticket = delivery.ask()
        progressed, before = monotonic(), -1
        while not delivery.finished and delivery.flushed < ticket:
            delivery.step(time())
            if delivery.delivered != before:
                progressed, before = monotonic(), delivery.delivered
            if monotonic() - progressed > timeout:
                return Synced(
                    path, header, "failed", f"no progress within {timeout:g} s: {delivery.trouble or 'nothing came back'}"
                )
            sleep(min(_LONGEST_NAP, max(0.0, delivery.due - time())))
        if problem := _ship_files(delivery, remote, timeout):
            return Synced(path, header, "failed", problem)
    finally:
        delivery.close()
        remote.close()
    outcome = {State.DONE: "complete", State.FAILED: "failed"}.get(delivery.state, "fenced" if delivery.fenced else "current")
    return Synced(path, header, outcome, delivery.error, remote.base_url)


def _ship_files(delivery: Delivery, remote: Remote, timeout: float) -> str:
    """The contents of the run's files; what is wrong with them, or ''."""
    uploads = delivery.uploads
    progressed, before = monotonic(), -1
    while uploads.busy:
        uploads.step(remote, time(), lambda: writer_alive(delivery.path))
        if uploads.progress != before:
            progressed, before = monotonic(), uploads.progress
        if monotonic() - progressed > timeout:
            return f"files: no progress within {timeout:g} s: {uploads.trouble}"
        sleep(min(_LONGEST_NAP, max(0.0, uploads.due - time())))
    return f"files: {uploads.error}" if uploads.failed else ""
