"""All deliveries to one server, worked off by one thread over one connection."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, time

from wbdist.core.branch import split_immutable
from wbdist.run.journal import JournalHeader
from wbdist.run.shipper.delivery import Delivery, Pace, State
from wbdist.run.shipper.remote import Remote
from wbdist.run.shipper.uploader import Uploader


class Lane:
    """Thread-safe. Attempts of one run begin in order: the server must have what an attempt builds upon before it begins."""

    def __init__(
        self, base_url: str, data_dir: str, api_key: Callable[[], str | None], log: logging.Logger, pace: Pace
    ) -> None:
        """`data_dir`: as for `Remote`. `api_key`: finds one when none is given."""
        self._find_key = api_key
        self._remote = Remote(base_url, None, data_dir)
        self._log = log
        self._pace = pace
        self._deliveries: dict[Path, Delivery] = {}
        self._condition = threading.Condition()
        self._uploader = Uploader(lambda: self._remote_for_files(base_url, data_dir), self.snapshot, self._condition)
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=f"lane {base_url}", daemon=True)
        self._thread.start()

    def add(self, path: Path, api_key: str | None) -> Delivery:
        """Begins to deliver `path`, or begins again when it had failed. Raises JournalCorruptError or OSError."""
        with self._condition:
            if api_key:
                self._remote.api_key = api_key
            known = self._deliveries.get(path)
            if known is None or known.state is State.FAILED:
                known = self._deliveries[path] = Delivery(path, self._remote, self._log, self._pace)
            self._condition.notify_all()
            return known

    def use_key(self, api_key: str) -> None:
        with self._condition:
            self._remote.api_key = api_key

    def flush(self, path: Path, timeout: float, priority: bool, files: bool = False) -> tuple[bool, str]:
        """Whether all that is in the journal now is acknowledged, and what is wrong; waits at most `timeout` seconds.

        `files`: the contents of its files too.
        """
        deadline = monotonic() + timeout
        with self._condition:
            delivery = self._deliveries[path]
            ticket = delivery.ask()
            if priority:
                self._deliveries = {path: delivery, **self._deliveries}
            self._condition.notify_all()
            while delivery.flushed < ticket and not (delivery.finished or delivery.fenced):
                if (rest := deadline - monotonic()) <= 0:
                    break
                self._condition.wait(rest)
            acked = not delivery.fenced and (delivery.flushed >= ticket or delivery.state is State.DONE)
            if not (acked and files):
                return acked, delivery.error
            uploads = delivery.uploads
            while uploads.busy and (rest := deadline - monotonic()) > 0:
                self._condition.wait(rest)
            return not (uploads.busy or uploads.failed), uploads.error or uploads.trouble

    def snapshot(self) -> list[Delivery]:
        with self._condition:
            return list(self._deliveries.values())

    def stop(self, timeout: float) -> None:
        """Sends what it can within `timeout` seconds."""
        deadline = monotonic() + timeout
        with self._condition:
            tickets = [(delivery, delivery.ask()) for delivery in self._deliveries.values() if not delivery.finished]
            self._condition.notify_all()
            while any(d.flushed < ticket and not d.finished for d, ticket in tickets) and (rest := deadline - monotonic()) > 0:
                self._condition.wait(rest)
            self._stopping = True
            self._uploader.stop()
            self._condition.notify_all()
        self._thread.join(max(0.0, deadline - monotonic()))

    def _work(self) -> None:
        while True:
            with self._condition:
                if self._stopping:
                    return
                ready = [
                    delivery for delivery in self._deliveries.values() if not delivery.finished and self._may_begin(delivery)
                ]
                now = time()
                due = [delivery for delivery in ready if delivery.due <= now]
                if not due:
                    self._condition.wait(min((d.due for d in ready), default=now + self._pace.idle) - now)
                    continue
            if self._remote.api_key is None:
                self._remote.api_key = self._find_key()
            for delivery in due:
                delivery.step(time())
                self._uploader.look(delivery)
                with self._condition:
                    self._condition.notify_all()

    def _remote_for_files(self, base_url: str, data_dir: str) -> Remote:
        return Remote(base_url, self._remote.api_key, data_dir)

    def _may_begin(self, delivery: Delivery) -> bool:
        """Under the lock. Whether nothing is still to come first of an older attempt of the same run, or of a fork's source."""
        return delivery.state is not State.OPENING or not any(
            _is_below(older.header, delivery.header) and not older.finished and not (older.caught_up and older.writer_lives)
            for older in self._deliveries.values()
        )


def _is_below(older: JournalHeader, header: JournalHeader) -> bool:
    """Whether `header`'s attempt may be built upon `older`'s."""
    if older.project != header.project:
        return False
    if older.run_id == header.run_id:
        return older.entity == header.entity and older.attempt < header.attempt
    return bool(header.base_run) and split_immutable(header.base_run)[0] == older.run_id
