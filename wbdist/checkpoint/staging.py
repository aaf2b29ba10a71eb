"""The copy of the state that is written while training goes on: one page-aligned region, kept from save to save.

Kept, because fresh memory costs several times a copy into warm memory (first touch). One is enough: saves never overlap.
The region holds whole files (`image.Layout`), so that nothing is copied a second time and the kernel can take the pages
as they are.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from wbdist.checkpoint.image import PAGE, Layout
from wbdist.errors import CheckpointError

_THREADED = 4
"""From so many intra-op threads on, torch's parallel copy beats one thread of the C library's (which does not read the
target's cache lines first: 10 GB/s against 5.8 GB/s on one core)."""
_STRIDE = 16 << 20
"""Bytes after which who waits for the copy is told of it: each time costs the training thread a switch."""


class Staged:
    """One save's files in the region, and their copying. Overwritten by the next `Arena.stage`.

    The training thread copies, another one reads what has been copied already: a disk need not wait for the last byte.
    """

    def __init__(
        self,
        layouts: Sequence[Layout] = (),
        files: Sequence[torch.Tensor] = (),
        samples: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        self.files = files
        """One whole file each, as bytes."""
        self.samples = [target for target, _ in samples]
        self.copied_at: float | None = None
        """When `copy` was through (`time.monotonic`)."""
        self._layouts = layouts
        self._live = samples
        self._cuda = any(source.is_cuda for source in self._sources())
        self._events: Sequence[Any] = ()
        self._lock = threading.Lock()
        self._reached = (0, 0)
        """All files before this one are copied, and of this one so many bytes."""
        self._waiting: list[tuple[tuple[int, int], threading.Event]] = []
        self._failure: BaseException | None = None
        for target, sample in samples:
            if not sample.is_cuda:
                target.copy_(sample)

    def _sources(self) -> Iterator[torch.Tensor]:
        yield from (place.box.tensor for layout in self._layouts for place in layout.places)
        yield from (sample for _, sample in self._live)

    def copy(self) -> None:
        """The training thread's pause, once. Values on the host are copied when this returns.

        Those on CUDA devices are copied on a stream of their own, which the device's current stream waits for, so that later
        kernels cannot change them too early: the host goes on at once.
        """
        try:
            self._copy()
        except BaseException as error:
            self._failure = error
            self._tell(len(self.files), 0)
            raise
        finally:
            self.copied_at = time.monotonic()
            self._layouts, self._live = (), ()  # the live tensors may go

    def _copy(self) -> None:
        plainly = torch.get_num_threads() < _THREADED
        told = 0
        for number, (file, layout) in enumerate(zip(self.files, self._layouts, strict=True)):
            address = file.data_ptr()
            ctypes.memmove(address, layout.header, len(layout.header))
            for place in layout.places:
                source = place.box.tensor
                if plainly and source.is_cpu and source.is_contiguous() and not (source.is_conj() or source.is_neg()):
                    ctypes.memmove(address + place.start, source.data_ptr(), source.nbytes)
                elif not source.is_cuda:
                    place.within(file).copy_(source)
                if place.start - told >= _STRIDE and not self._cuda:
                    told = place.start
                    self._tell(number, told)
            told = 0
        if self._cuda:
            pairs = zip(self.files, self._layouts, strict=True)
            boxes = [(place.within(file), place.box.tensor) for file, layout in pairs for place in layout.places]
            self._events = _copy_from_devices((target, live) for target, live in (*boxes, *self._live) if live.is_cuda)
        self._tell(len(self.files), 0)

    def _tell(self, file: int, size: int) -> None:
        with self._lock:
            self._reached = (file, size)
            # Who has what it waits for, and nobody else: on a busy machine each thread that wakes takes the core from this one.
            woken = [event for wanted, event in self._waiting if wanted <= self._reached]
            self._waiting = [entry for entry in self._waiting if entry[0] > self._reached]
        for event in woken:
            event.set()

    def ready(self, file: int, size: int) -> None:
        """Another thread: blocks until the first `size` bytes of `file` are what will be written; bounded by the copy's time.

        Raises CheckpointError when the copy has failed.
        """
        there = threading.Event()
        with self._lock:
            if (file, size) <= self._reached:
                there.set()
            else:
                self._waiting.append(((file, size), there))
        there.wait()
        if self._failure is not None:
            raise CheckpointError(f"the state could not be copied: {self._failure}") from self._failure
        for event in self._events:
            event.synchronize()

    def samples_ready(self) -> None:
        """Another thread: blocks until the samples are there, for those on devices until everything is."""
        if self._cuda:
            self.ready(len(self.files), 0)


class Arena:
    """The region. Used by the training thread; what it last staged may be read by one other."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def stage(self, layouts: Sequence[Layout], samples: Sequence[torch.Tensor] = ()) -> Staged:
        """Room for the files of `layouts`, to be filled by `Staged.copy`, with `samples` beside them, copied already."""
        sources = (place.box.tensor for layout in layouts for place in layout.places)
        starts, size = [], 0
        for layout in layouts:
            starts.append(size)
            size += -(-layout.size // PAGE) * PAGE
        sample_starts = []
        for sample in samples:
            sample_starts.append(size)
            size += -(-sample.nbytes // 16) * 16
        memory = self._take(size, pinned=any(source.is_cuda for source in (*sources, *samples)))
        files = [memory[start : start + layout.size] for start, layout in zip(starts, layouts, strict=True)]
        beside = [
            memory[start : start + sample.nbytes].view(sample.dtype).view(sample.shape)
            for start, sample in zip(sample_starts, samples, strict=True)
        ]
        return Staged(layouts, files, list(zip(beside, samples, strict=True)))

    def _take(self, size: int, *, pinned: bool) -> torch.Tensor:
        kept = self._memory
        if kept is None or kept.is_pinned() != pinned or not size <= len(kept) <= 2 * size + PAGE:
            self._memory = None  # the old one goes before the new one comes: never two
            del kept
            self._memory = kept = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else _pages(size)
        return kept[:size]


def _pages(size: int) -> torch.Tensor:
    region = mmap.mmap(-1, max(size, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not copied into forked workers of a data loader, which would make each later copy into it a page fault.
    region.madvise(mmap.MADV_DONTFORK)
    region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def _copy_from_devices(copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
    by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for target, source in copies:
        by_device.setdefault(source.device, []).append((target, source))
    events = []
    for device, wanted in by_device.items():
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for target, source in wanted:
                target.copy_(source, non_blocking=True)
                # The caller may let go of a state made for this call only; its memory must outlive the copy.
                source.record_stream(side)
            # Blocking: who waits for it sleeps, and leaves the core to training.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(side)
        current.wait_event(event)
        events.append(event)
    return events
