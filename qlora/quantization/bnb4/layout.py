"""The layout of 4-bit weights in bitsandbytes, as numbers; needs no torch."""

from __future__ import annotations

import math

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


def stored_base(*, double_quant: bool, unquantized_bytes: int) -> StoredBase:
    """Returns how a 4-bit base is stored; a product also decodes double-quantized absmax values to float32."""
    return StoredBase(
        lambda rows, columns: matrix_bytes(rows, columns, double_quant=double_quant),
        weight_bytes=0.5,
        unquantized_bytes=unquantized_bytes,
        decoding_bytes=4 / BLOCK if double_quant else 0,
    )
