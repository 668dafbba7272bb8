"""A dropout mask that is a function of two random numbers and the position of an element.

A mask from the random number generator must be kept for the backward pass. It takes a byte an element, a sixth of what
a step with the paper's dropout keeps. This mask is recomputed from the two numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_mask(x: Tensor, rate: float) -> Tensor:
    """Returns which elements of `x` [rows, columns] are kept, bool: each independently with probability `1 - rate`.

    The mixing function is "lowbias32" (C. Wellons, Hash Prospector) with a second random number between its rounds.
    """
    seeds = torch.randint(-(2**31), 2**31, (2,), device=x.device, dtype=torch.int32)
    row, column = (torch.arange(count, device=x.device, dtype=torch.int32) for count in x.shape)
    mixed = (row[:, None] * x.shape[1] + column) ^ seeds[0]
    mixed = (mixed ^ _shift(mixed, 16)) * 0x7FEB352D
    mixed = ((mixed ^ _shift(mixed, 15)) + seeds[1]) * (0x846CA68B - 2**32)
    mixed = mixed ^ _shift(mixed, 16)
    return (mixed & 0x7FFFFFFF) >= int(rate * 2**31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts to the right as if the numbers were unsigned."""
    return (x >> bits) & (2 ** (32 - bits) - 1)
