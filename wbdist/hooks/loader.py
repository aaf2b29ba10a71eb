"""A DataLoader that knows which samples it has handed out, and goes on from there.

What counts is what was *handed out*, not what workers fetched ahead: the position moves when a batch is given to the loop.
So save after the step that used the batch, and before the next batch is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from wbdist.core.mixing import mix64
from wbdist.errors import UsageError
from wbdist.hooks.ledger import Order
from wbdist.hooks.lookahead import SLICE, Arrival, LookAhead
from wbdist.hooks.sampler import Batch, Ids, ResumableSampler, Tail, fingerprint
from wbdist.hooks.workers import Workers

Token = tuple[int, int, int]
"""(epoch, global position, dataset index): what is asked of a worker instead of the bare index."""

_TIMED_OUT = f"DataLoader timed out after {SLICE} seconds"
"""How torch says that its `timeout` is over. The batch is not lost: it may be asked for again."""
_NOTHING = object()


class ResumableLoader:
    """Batches of a map-style dataset, shuffled and sharded over ranks, resumable at any step boundary.

    Every rank makes one with the same arguments but `rank`. Iterate it once an epoch: each `for` runs from the current
    position to the end of the epoch, then turns to the next. A loop left by `break` is continued by the next `for`.
    Which samples come when is told by `ResumableSampler`; track the loader in a Checkpointer (or keep `state_dict()`).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "drop",
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        seed_samples: bool | None = None,
    ) -> None:
        """`batch_size` is per rank; `tail` as in ResumableSampler; the rest as in torch's DataLoader.

        `seed_samples`: whether the global generators of Python, NumPy and torch are seeded from (seed, epoch, position)
        before each sample is fetched, so that random augmentation is a function of the sample's place. None does so in
        worker processes, whose generators a checkpoint cannot reach, and leaves the training process alone, whose
        generators it restores. True also does it there (about 12 us a sample), which makes augmentation the same
        for any number of workers. False leaves workers' augmentation unrepeatable.

        Workers ignore SIGTERM and SIGINT: a notice is answered by the training process, which needs its data until the
        agreed step; they are killed when it ends. Raises UsageError for an IterableDataset or a dataset without length.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise UsageError(
                f"{type(dataset).__name__} has no order to go back to: a resumable loader needs a map-style dataset, with "
                "__getitem__ and __len__"
            )
        self.sampler = ResumableSampler(
            len(dataset), batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle, tail=tail
        )
        self._last: Batch | None = None
        self._workers = Workers(worker_init_fn)
        self._tokens = _Tokens(self.sampler)
        self._loader: DataLoader[Any] = DataLoader(
            _Placed(dataset, seed, seed_samples),
            batch_sampler=self._tokens,
            num_workers=num_workers,
            timeout=SLICE if num_workers else 0,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            worker_init_fn=self._workers,
            # Of its own: each new iterator draws a seed, and drawing it from the global generator would make an epoch that
            # was resumed in its middle differ from one that was not.
            generator=torch.Generator().manual_seed(mix64(seed) >> 1),
        )

    @property
    def epoch(self) -> int:
        """The epoch being handed out, from 0. During the last batch's step it is still that batch's epoch."""
        return self.sampler.epoch

    @property
    def consumed(self) -> int:
        """Global samples of this epoch handed out so far, over all ranks."""
        return self.sampler.consumed

    def __len__(self) -> int:
        """Batches in a whole epoch, for each rank."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for arrival in self._arriving():
            if arrival is not None:
                hand_out, data = arrival
                hand_out()
                yield data
        self.sampler.next_epoch()

    @property
    def looks_ahead(self) -> bool:
        """Whether `epochs` holds batches ahead: where worker processes make them."""
        return self._loader.num_workers > 0

    def epochs(self, end: int, *, ahead: int = 1) -> LookAhead:
        """The batches from the current position to the end of epoch `end - 1`. With workers, `ahead` are held behind the one
        that is handed out, and an epoch's workers start before the last batches of the epoch before are handed out."""
        return LookAhead(self._arriving_until(end), partial(self._turn_to, end), ahead if self.looks_ahead else 0)

    def abandon(self) -> None:
        """Main thread: what `epochs` gave is not asked again. Ends its workers at once, which may be waiting for their data."""
        self._workers.kill()

    def _arriving_until(self, end: int) -> Iterator[Arrival | None]:
        first = self.epoch
        for epoch in range(first, end):
            yield from self._arriving(None if epoch == first else epoch)

    def _arriving(self, epoch: int | None = None) -> Iterator[Arrival | None]:
        """What is left of this epoch, or all of a later `epoch`; None whenever SLICE seconds have brought nothing."""
        self._tokens.epoch = epoch
        batches = self.sampler.batches(epoch)
        with self._workers.starting():
            fetched = iter(self._loader)
        for batch in batches:
            data: Any = _NOTHING
            while data is _NOTHING:
                try:
                    data = next(fetched)
                except RuntimeError as error:
                    if str(error) != _TIMED_OUT:
                        raise
                    yield None
            yield partial(self._hand_out, batch), data

    def _turn_to(self, epoch: int) -> None:
        if epoch > self.epoch:
            self.sampler.next_epoch()

    def _hand_out(self, batch: Batch) -> None:
        self._turn_to(batch.epoch)
        self.sampler.advance(batch)
        self._last = batch

    @property
    def last_ids(self) -> Ids:
        """Dataset indices in the batch handed out last on this rank. UsageError before the first."""
        return self._handed_out().ids

    @property
    def last_positions(self) -> range:
        """Global positions, within the epoch, of the batch handed out last on this rank. UsageError before the first."""
        return self._handed_out().positions

    def fingerprint(self) -> int:
        """A number for the batch handed out last on this rank: which samples, in which order, in which epoch.

        The sum over its samples of `mix64(epoch, global position, index) >> 11`, modulo 2**53. The sum over all ranks modulo
        2**53 is the same for any number of ranks. UsageError before the first batch.
        """
        batch = self._handed_out()
        return fingerprint(batch.epoch, batch.positions, batch.ids)

    def ledger(self) -> dict[str, int | str]:
        """What the run's row says of the batch handed out last, for `wbdist audit` to prove what was used; see `ledger.py`.

        UsageError before the first batch.
        """
        batch = self._handed_out()
        said: dict[str, int | str] = {
            "_samples": fingerprint(batch.epoch, batch.positions, batch.ids),
            "epoch": batch.epoch,
            "_consumed": batch.stop,
            "_batch": batch.stop - batch.start,
        }
        if batch.start == 0:
            said["_data"] = str(Order.of(self.sampler))
        return said

    def state_dict(self) -> dict[str, Any]:
        """The position and what the order depends on; the same on all ranks, whatever their number."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position, also of another number of ranks. Raises UsageError when the order was another one."""
        self.sampler.load_state_dict(state)
        self._last = None

    def _handed_out(self) -> Batch:
        if self._last is None:
            raise UsageError("no batch has been handed out yet")
        return self._last


class _Tokens:
    """The sampler as DataLoader sees it: lists of tokens from the current position on."""

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler = sampler
        self.epoch: int | None = None
        """The next iterator's; None for the one that is being consumed."""

    def __iter__(self) -> Iterator[list[Token]]:
        batches = self._sampler.batches(self.epoch)
        return ([(b.epoch, p, i) for p, i in zip(b.positions, b.ids.tolist(), strict=True)] for b in batches)

    def __len__(self) -> int:
        return self._sampler.left


class _Placed(Dataset[Any]):
    """The dataset, asked by token; seeds the generators from a sample's place where that is wanted."""

    def __init__(self, dataset: Dataset[Any], seed: int, seed_samples: bool | None) -> None:
        self._dataset = dataset
        self._seed = seed
        self._seed_samples = seed_samples

    def __getitem__(self, token: Token) -> Any:
        return self.__getitems__([token])[0]

    def __getitems__(self, tokens: list[Token]) -> list[Any]:
        if get_worker_info() is not None:
            return self._fetch(tokens, seeded=self._seed_samples is not False)
        if not self._seed_samples:
            return self._fetch(tokens, seeded=False)
        # In the training process its own generators must not notice. NumPy's is swapped, not copied: 20 times faster.
        python, host, numpy = random.getstate(), torch.get_rng_state(), np.random.get_bit_generator()  # type: ignore[attr-defined]  # (numpy's stubs lag)
        np.random.set_bit_generator(np.random.MT19937())  # type: ignore[attr-defined]
        try:
            return self._fetch(tokens, seeded=True)
        finally:
            np.random.set_bit_generator(numpy)  # type: ignore[attr-defined]
            torch.set_rng_state(host)
            random.setstate(python)

    def _fetch(self, tokens: list[Token], *, seeded: bool) -> list[Any]:
        whole_batch = getattr(self._dataset, "__getitems__", None)
        if whole_batch is not None:
            if seeded:
                self._reseed(tokens[0])
            return list(whole_batch([index for _, _, index in tokens]))
        samples = []
        for token in tokens:
            if seeded:
                self._reseed(token)
            samples.append(self._dataset[token[2]])
        return samples

    def _reseed(self, token: Token) -> None:
        word = mix64(self._seed, token[0], token[1])
        random.seed(word)
        np.random.seed(word & 0xFFFFFFFF)
        torch.default_generator.manual_seed(word >> 1)
