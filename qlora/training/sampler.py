"""The order of rows, and how the processes of a training run share it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Yields row indices such that each run of `batch_size` has about equal lengths.

    Rows are drawn at random into pools of 50 batches, each pool is sorted by length and cut into batches, and the
    batches are shuffled. transformers' sampler leaves out the last step: its batches go from the longest rows to
    the shortest, 50 at a time, so that the kinds of rows come in waves. The longest batch comes first, so that a
    lack of memory shows at once. The order depends on the seed and the epoch only, so that a run that is resumed
    within an epoch continues it.
    """

    POOL = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = torch.as_tensor(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; the trainer calls it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.lengths), generator=draw)
        pools = order.split(self.POOL * self.batch_size)
        ordered = [pool[torch.argsort(self.lengths[pool], descending=True, stable=True)] for pool in pools]
        batches = [batch for pool in ordered for batch in pool.split(self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # at most one, of the last pool
        first = max(range(len(whole)), key=lambda index: int(self.lengths[whole[index]].sum()), default=0)
        shuffled = [first, *(index for index in torch.randperm(len(whole), generator=draw).tolist() if index != first)]
        for batch in [*(whole[index] for index in shuffled if whole), *rest]:
            yield from batch.tolist()


class ShuffledSampler(Sampler[int]):
    """Yields row indices in random order, which follows from the seed and the epoch alone."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        yield from torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed)).tolist()


class OrderedSampler(Sampler[int]):
    """Yields row indices in order."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the rows come once."""

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        yield from range(self.rows)


class SharedBatches(Sampler[list[int]]):
    """Yields the micro-batches of one of several processes, as lists of row indices.

    All processes take a micro-batch of each `processes` in turn, so that a step holds the same rows however many
    processes share it. At the end of a pass some get fewer rows than others, or none: an empty list.
    """

    def __init__(
        self, order: LengthGroupedSampler | ShuffledSampler | OrderedSampler, rows: int, *, process: int, processes: int
    ) -> None:
        self.order, self.rows, self.process, self.processes = order, rows, process, processes

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; the trainer calls it before each."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // (self.rows * self.processes))

    def items(self, epoch: int, first: int, count: int) -> list[int]:
        """Returns the row indices of `count` micro-batches of a pass, from the one numbered `first` on."""
        order = copy.copy(self.order)
        order.set_epoch(epoch)
        batches = SharedBatches(order, self.rows, process=self.process, processes=self.processes)
        return [index for batch in islice(batches, first, first + count) for index in batch]

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.order)
        while taken := list(islice(order, self.rows * self.processes)):
            yield taken[self.process * self.rows :][: self.rows]
