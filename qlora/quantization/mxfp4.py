"""MXFP4, as gpt-oss is stored: 4-bit floats in blocks of 32, each block with a power of two as its scale (OCP MX 1.0).

A matrix [out, in] is stored as `NAME_blocks`, uint8 [out, in / 32, 16] with two codes a byte, the first in the low
bits, and `NAME_scales`, uint8 [out, in / 32], whose value is the exponent of two plus 127. Decoded numbers are exact in
bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "mxfp4"
"""The `quant_method` in a `config.json`."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of the two tensors of a weight end with."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns weights [..., out, in] of their blocks [..., out, in / 32, 16] and scales [..., out, in / 32].

    Both hold bytes, in any dtype.
    """
    if blocks.shape[:-1] != scales.shape:
        raise ValueError(f"blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}")
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=blocks.device)
    codes = blocks.to(torch.uint8)
    pairs = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)
    exponents = scales.to(torch.int32) - BIAS
    return torch.ldexp(values[pairs.int()], exponents[..., None]).flatten(-2).to(dtype)
