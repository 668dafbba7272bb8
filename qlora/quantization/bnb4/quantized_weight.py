"""4-bit weights of bitsandbytes as plain tensors, and the reference that dequantizes them.

bitsandbytes packs two 4-bit codes in a byte (the first in the high bits) and keeps one absmax for each block of 64
weights. With double quantization an absmax is one byte, an index into a codebook of 256 values, scaled by one float32
for every 256 of them, plus one offset for all (QLoRA, arXiv 2305.14314, section 3). The kernels in `decode_kernels`
decode all of it in one pass that writes full cache lines; `bitsandbytes.functional.dequantize_4bit` is their twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlora.quantization.bnb4.layout import BLOCK, GROUP
from qlora.upstream.bitsandbytes import quant_state

E4M3_MAX = 448.0
"""The largest number of the 8-bit float with 3 bits of mantissa."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class QuantizedWeight:
    """The frozen weight of one linear layer, [rows, columns] when decoded.

    Those of several experts have one more dimension, the first: of the weight, and of each tensor but the codebooks.
    """

    packed: Tensor
    """uint8 [rows * columns / 2]"""
    absmax: Tensor
    """uint8 (double quantization) or float32, [rows * columns / 64]"""
    codebook: Tensor
    """float32 [16]: the value of each 4-bit code."""
    nested_codebook: Tensor
    """float32 [256]: the value of each byte of `absmax`, or empty."""
    nested_absmax: Tensor
    """float32 [len(absmax) / 256], or empty."""
    nested_offset: Tensor
    """float32 [len(absmax) / 256], added to the decoded `absmax`, or empty."""
    rows: int
    columns: int

    @property
    def is_nested(self) -> bool:
        """Whether the absmax values are quantized too."""
        return self.absmax.dtype is torch.uint8

    def part(self, start: int, stop: int) -> QuantizedWeight:
        """Returns rows `start` to `stop` without copying; `start` must not split a group of absmax values."""
        first, last = start * self.columns // BLOCK, stop * self.columns // BLOCK
        assert not self.is_nested or first % GROUP == 0
        groups = slice(first // GROUP, -(-last // GROUP))
        return replace(
            self,
            packed=self.packed[first * BLOCK // 2 : last * BLOCK // 2],
            absmax=self.absmax[first:last],
            nested_absmax=self.nested_absmax[groups],
            nested_offset=self.nested_offset[groups],
            rows=stop - start,
        )

    def tensors(self) -> list[Tensor]:
        """Returns the six tensors in the order of their fields."""
        return [
            self.packed, self.absmax, self.codebook, self.nested_codebook, self.nested_absmax, self.nested_offset,
        ]  # fmt: skip


def read_quantized_weight(weight: Tensor) -> QuantizedWeight | None:
    """Returns the tensors that bitsandbytes keeps of a 4-bit weight, without copying; None for an unusual layout.

    For a sharded weight, whose bytes are kept as float32, `packed` is the shard of this process.
    """
    state = getattr(weight, "quant_state", None)
    is_sharded = isinstance(weight, DTensor)
    if state is None or state.blocksize != BLOCK or weight.dtype is not (torch.float32 if is_sharded else torch.uint8):
        return None
    packed = weight.to_local() if isinstance(weight, DTensor) else weight
    rows, columns = state.shape
    if columns % BLOCK or (state.nested and state.state2.blocksize != GROUP):
        return None
    empty = state.absmax.new_empty(0, dtype=torch.float32)
    return QuantizedWeight(
        packed=packed.detach().as_subclass(Tensor).view(torch.uint8).view(-1),
        absmax=state.absmax,
        codebook=state.code,
        nested_codebook=state.state2.code if state.nested else empty,
        nested_absmax=state.state2.absmax if state.nested else empty,
        nested_offset=state.offset.expand(len(state.state2.absmax)).contiguous() if state.nested else empty,
        rows=rows,
        columns=columns,
    )


def can_join(weights: Sequence[QuantizedWeight]) -> bool:
    """Returns whether weights can be stacked by rows: all of one kind, and no group of absmax values spans two."""
    first = weights[0]
    are_alike = all(
        weight.columns == first.columns
        and weight.is_nested == first.is_nested
        and torch.equal(weight.codebook, first.codebook)
        and torch.equal(weight.nested_codebook, first.nested_codebook)
        for weight in weights
    )
    return are_alike and not (first.is_nested and any(len(weight.absmax) % GROUP for weight in weights))


def join(weights: Sequence[Tensor]) -> QuantizedWeight:
    """Stacks 4-bit weights of bitsandbytes by rows and returns them as one.

    The weights become views of the joint storage, so that nothing is stored twice; joined again, they stay where they
    are. Sharded weights keep their storage, and `packed` is empty.
    """
    parts = [part for weight in weights if (part := read_quantized_weight(weight)) is not None]
    is_sharded = isinstance(weights[0], DTensor)
    if is_sharded:
        parts = [replace(part, packed=part.packed[:0]) for part in parts]
    if len(parts) == 1:
        return parts[0]
    assert len(parts) == len(weights)
    assert can_join(parts)
    packed, absmax, nested_absmax, nested_offset = (
        _join_flat([getattr(part, name) for part in parts])
        for name in ("packed", "absmax", "nested_absmax", "nested_offset")
    )
    views = zip(
        weights,
        packed.split([len(part.packed) for part in parts]),
        absmax.split([len(part.absmax) for part in parts]),
        nested_absmax.split([len(part.nested_absmax) for part in parts]),
        strict=True,
    )
    for weight, packed_view, absmax_view, nested_view in views:
        if not is_sharded:
            weight.data = packed_view.view(weight.shape)
        quant_state(weight).absmax = absmax_view
        if parts[0].is_nested:
            quant_state(weight).state2.absmax = nested_view
    first = parts[0]
    rows = sum(part.rows for part in parts)
    return QuantizedWeight(
        packed, absmax, first.codebook, first.nested_codebook, nested_absmax, nested_offset, rows, first.columns
    )


def _join_flat(tensors: Sequence[Tensor]) -> Tensor:
    """Returns tensors of one dimension as one, without copying those that lie packed in one storage."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        is_next = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not is_next or tensor.storage_offset() != end or not tensor.is_contiguous():
            return torch.cat(list(tensors))
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def decode_absmax(weight: QuantizedWeight) -> Tensor:
    """Returns the absmax of all blocks, float32 [rows * columns / 64]."""
    if not weight.is_nested:
        return weight.absmax
    group = torch.arange(weight.absmax.shape[-1], device=weight.absmax.device) // GROUP
    decoded = weight.nested_codebook[weight.absmax.int()]
    return decoded * weight.nested_absmax[..., group] + weight.nested_offset[..., group]


def weight_scale(weight: QuantizedWeight) -> Tensor:
    """Returns the factor with which a weight fills the range of e4m3: float32 [1]."""
    amax = decode_absmax(weight).abs().amax() * weight.codebook.abs().amax()
    return (E4M3_MAX / amax.clamp(min=1e-12)).view(1)


def decode_plain(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight, `dtype` [rows, columns], by table look-ups; the twin of the kernels."""
    size = weight.rows * weight.columns
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], -1).flatten(-2)[..., :size]
    scales = decode_absmax(weight).repeat_interleave(BLOCK, dim=-1)[..., :size]
    return (weight.codebook[codes.int()] * scales).to(dtype).view(*codes.shape[:-1], weight.rows, weight.columns)
