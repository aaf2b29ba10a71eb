"""The copy of the state that is written while training goes on: one page-aligned region, kept from save to save.

Kept, because fresh memory costs several times a copy into warm memory (first touch). One is enough: saves never overlap.
The region holds whole files (`image.Layout`), so that nothing is copied a second time and the kernel can take the pages
as they are.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from wbdist.checkpoint.image import PAGE, Layout

_THREADED = 4
"""From so many intra-op threads on, torch's parallel copy beats one thread of the C library's (which does not read the
target's cache lines first: 10 GB/s against 5.8 GB/s on one core)."""


class Staged:
    """Copies that are complete once `ready` has returned; overwritten by the next `Arena.stage`."""

    def __init__(
        self, files: Sequence[torch.Tensor] = (), samples: Sequence[torch.Tensor] = (), events: Sequence[Any] = ()
    ) -> None:
        self.files = files
        """One whole file each, as bytes."""
        self.samples = samples
        self._events = events

    def ready(self) -> None:
        """Any thread: blocks until the devices have delivered their copies."""
        for event in self._events:
            event.synchronize()


class Arena:
    """The region. Used by the training thread; what it last staged may be read by one other."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def stage(self, layouts: Sequence[Layout], samples: Sequence[torch.Tensor] = ()) -> Staged:
        """Copies the boxes of `layouts` into files, and `samples` beside them. The training thread's only pause.

        Values on the host are copied when this returns. Those on CUDA devices are copied on a stream of their own, which
        the device's current stream waits for, so that later kernels cannot change them too early: the host goes on at once.
        """
        boxes = (place.box.tensor for layout in layouts for place in layout.places)
        cuda = any(source.is_cuda for source in (*boxes, *samples))
        starts, size = [], 0
        for layout in layouts:
            starts.append(size)
            size += -(-layout.size // PAGE) * PAGE
        sample_starts = []
        for sample in samples:
            sample_starts.append(size)
            size += -(-sample.nbytes // 16) * 16
        memory = self._take(size, pinned=cuda)
        files = [memory[start : start + layout.size] for start, layout in zip(starts, layouts, strict=True)]
        beside = [
            memory[start : start + sample.nbytes].view(sample.dtype).view(sample.shape)
            for start, sample in zip(sample_starts, samples, strict=True)
        ]
        for target, sample in zip(beside, samples, strict=True):
            if not sample.is_cuda:
                target.copy_(sample)
        plainly = torch.get_num_threads() < _THREADED
        for file, layout in zip(files, layouts, strict=True):
            address = file.data_ptr()
            ctypes.memmove(address, layout.header, len(layout.header))
            for place in layout.places:
                source = place.box.tensor
                if plainly and source.is_cpu and source.is_contiguous() and not (source.is_conj() or source.is_neg()):
                    ctypes.memmove(address + place.start, source.data_ptr(), source.nbytes)
                elif not source.is_cuda:
                    place.within(file).copy_(source)
        if not cuda:
            return Staged(files, beside)
        on_devices = [
            (place.within(file), place.box.tensor)
            for file, layout in zip(files, layouts, strict=True)
            for place in layout.places
            if place.box.tensor.is_cuda
        ]
        on_devices += [(target, sample) for target, sample in zip(beside, samples, strict=True) if sample.is_cuda]
        return Staged(files, beside, _copy_from_devices(on_devices))

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
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(side)
        current.wait_event(event)
        events.append(event)
    return events
