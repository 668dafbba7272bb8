"""4-bit base weights as plain tensors, and what turns them back into matrices.

bitsandbytes stores two values a byte (the first in the high bits), one scale for every 64 values and, with double
quantization, that scale as one byte of a code of 256 values, scaled by one float32 for every 256 scales, plus an offset
for all (QLoRA, arXiv 2305.14314, section 3). Decoding all of it in one pass that writes full cache lines is what the
kernels here do; `bitsandbytes.functional.dequantize_4bit` is their twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 64
"""Values that share a scale."""
GROUP = 256
"""Scales that share a scale of their own, with double quantization."""
E4M3_MAX = 448.0
"""The largest number of the 8-bit float with 3 bits of mantissa."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The frozen weight of one linear layer, [rows, columns] when decoded."""

    packed: Tensor
    """uint8 [rows * columns / 2]"""
    scales: Tensor
    """uint8 (double quantization) or float32, [rows * columns / 64]"""
    values: Tensor
    """float32 [16]: what the 4-bit codes stand for."""
    scale_values: Tensor
    """float32 [256] that the bytes of `scales` stand for, or empty."""
    scale_scales: Tensor
    """float32 [scales / 256], or empty."""
    offsets: Tensor
    """float32 [scales / 256], added to the scales, or empty."""
    rows: int
    columns: int

    @property
    def is_nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.scales.dtype is torch.uint8

    def part(self, start: int, stop: int) -> QuantizedWeight:
        """Returns rows `start` to `stop` without copying; `start` must cut no group of scales."""
        first, last = start * self.columns // BLOCK, stop * self.columns // BLOCK
        assert not self.is_nested or first % GROUP == 0
        groups = slice(first // GROUP, -(-last // GROUP))
        return replace(
            self,
            packed=self.packed[first * BLOCK // 2 : last * BLOCK // 2],
            scales=self.scales[first:last],
            scale_scales=self.scale_scales[groups],
            offsets=self.offsets[groups],
            rows=stop - start,
        )

    def tensors(self) -> list[Tensor]:
        """Returns the six tensors in the order of their fields."""
        return [self.packed, self.scales, self.values, self.scale_values, self.scale_scales, self.offsets]


def read_codes(weight: Tensor) -> QuantizedWeight | None:
    """Returns what bitsandbytes stores of a 4-bit weight, without copying; None for a layout that is not usual.

    Of a weight that is sharded, whose bytes are stored as float32, `packed` is the part of this process.
    """
    state = getattr(weight, "quant_state", None)
    is_sharded = isinstance(weight, DTensor)
    if state is None or state.blocksize != BLOCK or weight.dtype is not (torch.float32 if is_sharded else torch.uint8):
        return None
    packed = weight.to_local() if is_sharded else weight
    rows, columns = state.shape
    if columns % BLOCK or (state.nested and state.state2.blocksize != GROUP):
        return None
    empty = state.absmax.new_empty(0, dtype=torch.float32)
    return QuantizedWeight(
        packed=packed.detach().as_subclass(Tensor).view(torch.uint8).view(-1),
        scales=state.absmax,
        values=state.code,
        scale_values=state.state2.code if state.nested else empty,
        scale_scales=state.state2.absmax if state.nested else empty,
        offsets=state.offset.expand(len(state.state2.absmax)).contiguous() if state.nested else empty,
        rows=rows,
        columns=columns,
    )


def can_join(codes: Sequence[QuantizedWeight]) -> bool:
    """Returns whether weights can be stored one below the other: of one kind, and no scales' group spans two."""
    first = codes[0]
    alike = all(
        each.columns == first.columns
        and each.is_nested == first.is_nested
        and torch.equal(each.values, first.values)
        and torch.equal(each.scale_values, first.scale_values)
        for each in codes
    )
    return alike and not (first.is_nested and any(len(each.scales) % GROUP for each in codes))


def join(weights: Sequence[Tensor]) -> QuantizedWeight:
    """Stores bitsandbytes' 4-bit weights one below the other, and returns them as one.

    The weights themselves become views of the joint storage, so that nothing is stored twice. Sharded weights stay
    where they are, and `packed` is empty.
    """
    parts = [codes for weight in weights if (codes := read_codes(weight)) is not None]
    is_sharded = isinstance(weights[0], DTensor)
    if is_sharded:
        parts = [replace(codes, packed=codes.packed[:0]) for codes in parts]
    if len(parts) == 1:
        return parts[0]
    assert len(parts) == len(weights)
    assert can_join(parts)
    packed, scales, scale_scales, offsets = (
        torch.cat([getattr(each, name) for each in parts]) for name in ("packed", "scales", "scale_scales", "offsets")
    )
    pieces = zip(
        weights,
        packed.split([len(each.packed) for each in parts]),
        scales.split([len(each.scales) for each in parts]),
        scale_scales.split([len(each.scale_scales) for each in parts]),
        strict=True,
    )
    for weight, own, own_scales, own_scale_scales in pieces:
        if not is_sharded:
            weight.data = own.view(weight.shape)
        weight.quant_state.absmax = own_scales
        if parts[0].is_nested:
            weight.quant_state.state2.absmax = own_scale_scales
    first = parts[0]
    rows = sum(each.rows for each in parts)
    return QuantizedWeight(packed, scales, first.values, first.scale_values, scale_scales, offsets, rows, first.columns)


def decode_scales(codes: QuantizedWeight) -> Tensor:
    """Returns the scales of all blocks, float32 [rows * columns / 64]."""
    if not codes.is_nested:
        return codes.scales
    of_group = torch.arange(len(codes.scales), device=codes.scales.device) // GROUP
    return codes.scale_values[codes.scales.int()] * codes.scale_scales[of_group] + codes.offsets[of_group]


def decode_plain(codes: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight, `dtype` [rows, columns], by table look-ups; the twin of `decode`."""
    pairs = torch.stack([codes.packed >> 4, codes.packed & 15], -1).view(-1, BLOCK)
    return (codes.values[pairs.int()] * decode_scales(codes)[:, None]).to(dtype).view(codes.rows, codes.columns)
