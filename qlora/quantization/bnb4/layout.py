"""The layout of 4-bit weights in bitsandbytes, as numbers; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from qlora.quantization.stored_base import StoredBase

BLOCK = 64
"""Weights that share an absmax."""
GROUP = 256
"""Absmax values that share an absmax of their own, with double quantization."""


def matrix_bytes(rows: int, columns: int, *, double_quant: bool) -> int:
    """Returns what a matrix takes, with its absmax values and codebooks."""
    weights, codebook = rows * columns, 16 * 4
    blocks = math.ceil(weights / BLOCK)
    packed = math.ceil(weights / 2) + codebook
    if not double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * math.ceil(blocks / GROUP) + 256 * 4 + 4  # the nested codebook and its offset


def experts_bytes(count: int, units: Sequence[tuple[int, int]], *, double_quant: bool) -> int:
    """Returns what a layer's experts take: a matrix of each of these sizes for each expert, and shared codebooks.

    An expert's matrix has its own offset, and says whether it was finite.
    """
    total = 16 * 4 + (256 * 4 if double_quant else 0)
    for rows, columns in units:
        blocks = math.ceil(rows * columns / BLOCK)
        scales = blocks + 4 * math.ceil(blocks / GROUP) if double_quant else 4 * blocks
        total += count * (math.ceil(rows * columns / 2) + scales + 4 + 1)
    return total


def stored_base(*, double_quant: bool, unquantized_bytes: int, experts: bool) -> StoredBase:
    """Returns how a 4-bit base is stored; a product also decodes double-quantized absmax values to float32.

    `experts`: those of a mixture are in 4 bits, too.
    """
    return StoredBase(
        lambda rows, columns: matrix_bytes(rows, columns, double_quant=double_quant),
        weight_bytes=0.5,
        unquantized_bytes=unquantized_bytes,
        decoding_bytes=4 / BLOCK if double_quant else 0,
        experts_bytes=partial(experts_bytes, double_quant=double_quant) if experts else None,
    )
