"""The order of rows grouped by their lengths."""

from __future__ import annotations

import torch

from qlora.training.sampler import LengthGroupedSampler

LENGTHS = [(7 * number) % 90 + 1 for number in range(1003)]


def test_every_row_comes_once_in_batches_of_about_equal_lengths_the_longest_first() -> None:
    order = list(LengthGroupedSampler(LENGTHS, 4, seed=0))
    assert sorted(order) == list(range(len(LENGTHS)))
    batches = [[LENGTHS[row] for row in order[start : start + 4]] for start in range(0, 1000, 4)]
    assert max(max(batch) - min(batch) for batch in batches) < 10
    assert sum(batches[0]) == max(map(sum, batches))
    assert batches[:20] != sorted(batches[:20], reverse=True)


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(len(order_))
        sampler = LengthGroupedSampler(LENGTHS, 4, seed)
        sampler.set_epoch(epoch)
        order_.append(tuple(sampler))
        return list(order_[-1])

    order_: list[tuple[int, ...]] = []
    assert order(0, 1) == order(0, 1)
    order(0, 0), order(1, 0), order(1, 1)
    assert len(set(order_)) == 4
