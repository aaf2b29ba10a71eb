"""The thread that sends the files of all journals of one lane, over a connection of its own: lines never wait for files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from time import time
from typing import TYPE_CHECKING

from wbdist.run.journal_reader import writer_alive
from wbdist.run.shipper.remote import Remote

if TYPE_CHECKING:
    from wbdist.run.shipper.delivery import Delivery


class Uploader:
    """Begins with the first file: most runs have none, and need neither its thread nor its connection."""

    def __init__(
        self, connect: Callable[[], Remote], deliveries: Callable[[], list[Delivery]], changed: threading.Condition
    ) -> None:
        """`changed` is notified after each step."""
        self._connect = connect
        self._deliveries = deliveries
        self._changed = changed
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def look(self, delivery: Delivery) -> None:
        """There may be something to upload. One thread at a time calls this."""
        if not (delivery.uploads.busy or delivery.uploads.watching):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
            self._thread.start()
        if delivery.uploads.due <= time():
            self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def _work(self) -> None:
        remote = self._connect()
        while not self._stopping:
            active = [d for d in self._deliveries() if d.uploads.busy or d.uploads.watching]
            now = time()
            for delivery in active:
                if delivery.uploads.due <= now and not self._stopping:
                    remote.api_key = delivery.remote.api_key
                    delivery.uploads.step(remote, now, partial(writer_alive, delivery.path))
                    with self._changed:
                        self._changed.notify_all()
            due = min((d.uploads.due for d in active), default=now + 3600.0)
            self._wake.wait(max(0.0, due - time()))
            self._wake.clear()
        remote.close()
