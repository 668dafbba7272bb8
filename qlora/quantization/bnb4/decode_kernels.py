"""Triton kernels that decode 4-bit weights, with their double-quantized absmax values, in one pass.

They write 16- or 32-bit matrices (`decode_rows`), or 8-bit floats in either layout (`decode_rows`, `decode_columns`).
`quantized_weight.decode_plain` is the twin; `TRITON_INTERPRET=1` runs the kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.quantization.bnb4.quantized_weight import BLOCK, QuantizedWeight
from qlora.upstream.triton import cdiv, cheap_launch, next_power_of_2

BLOCKS = 128
"""Blocks of 64 weights that one program of `decode_rows` decodes."""
TILE = 128
"""Rows of the tile of 64 columns that one program of `decode_columns` transposes."""


@triton.jit
def _decode(packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset, block, mask, NESTED: tl.constexpr):
    """Decodes blocks: float32 [blocks, 64]."""
    byte = tl.load(packed + block[:, None] * 32 + tl.arange(0, 32)[None, :], mask=mask[:, None], other=0)
    scale = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        group = tl.load(nested_absmax + block // 256, mask=mask, other=0.0)
        scale = tl.load(nested_codebook + scale.to(tl.int32)) * group + tl.load(
            nested_offset + block // 256, mask=mask, other=0.0
        )
    first = tl.load(codebook + (byte >> 4).to(tl.int32))
    second = tl.load(codebook + (byte & 15).to(tl.int32))
    return tl.interleave(first, second) * scale[:, None]


@cheap_launch
@triton.jit
def _rows_kernel(
    packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset, weight_scale, out, columns, stride, blocks,
    NESTED: tl.constexpr, SCALED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < blocks
    decoded = _decode(packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset, block, mask, NESTED)
    if SCALED:
        decoded = decoded * tl.load(weight_scale)
    a_row = columns // 64
    offset = (block // a_row).to(tl.int64) * stride + (block % a_row) * 64
    tl.store(out + offset[:, None] + tl.arange(0, 64)[None, :], decoded.to(out.dtype.element_ty), mask=mask[:, None])


@cheap_launch
@triton.jit
def _columns_kernel(
    packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset, weight_scale, out, rows, columns, stride,
    NESTED: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    a_row = columns // 64
    block = row * a_row + tl.program_id(1)
    mask = row < rows
    decoded = _decode(packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset, block, mask, NESTED)
    if SCALED:
        decoded = decoded * tl.load(weight_scale)
    column = tl.program_id(1) * 64 + tl.arange(0, 64)
    target = out + column.to(tl.int64)[:, None] * stride + row[None, :]
    tl.store(target, tl.trans(decoded.to(out.dtype.element_ty)), mask=mask[None, :])


@cheap_launch
@triton.jit
def _experts_kernel(
    packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset, weight_scale, out, columns, blocks,
    expert_stride, row_stride, NESTED: tl.constexpr, SCALED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < blocks
    groups = (blocks + 255) // 256
    decoded = _decode(
        packed + expert * blocks * 32, absmax + expert * blocks, codebook, nested_codebook,
        nested_absmax + expert * groups, nested_offset + expert * groups, block, mask, NESTED,
    )  # fmt: skip
    if SCALED:
        decoded = decoded * tl.load(weight_scale)
    a_row = columns // 64
    offset = expert * expert_stride + (block // a_row).to(tl.int64) * row_stride + (block % a_row) * 64
    tl.store(out + offset[:, None] + tl.arange(0, 64)[None, :], decoded.to(out.dtype.element_ty), mask=mask[:, None])


@cheap_launch
@triton.jit
def _turned_experts_kernel(
    packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset, weight_scale, out, rows, columns,
    expert_stride, row_stride, column_stride, NESTED: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    a_row = columns // 64
    blocks = rows * a_row
    groups = (blocks + 255) // 256
    mask = row < rows
    decoded = _decode(
        packed + expert * blocks * 32, absmax + expert * blocks, codebook, nested_codebook,
        nested_absmax + expert * groups, nested_offset + expert * groups, row * a_row + tl.program_id(1), mask, NESTED,
    )  # fmt: skip
    if SCALED:
        decoded = decoded * tl.load(weight_scale)
    column = tl.program_id(1) * 64 + tl.arange(0, 64)
    target = out + expert * expert_stride + column.to(tl.int64)[:, None] * column_stride
    target += row.to(tl.int64)[None, :] * row_stride
    tl.store(target, tl.trans(decoded.to(out.dtype.element_ty)), mask=mask[None, :])


@cheap_launch
@triton.jit
def _scale_kernel(x, weight_scale, out, scales, columns, stride, SCALED: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < columns
    values = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values)), 1e-12) / 448.0
    tl.store(out + row * columns + column, (values / scale).to(tl.float8e4nv), mask=mask)
    if SCALED:
        scale = tl.div_rn(scale, tl.load(weight_scale))
    tl.store(scales + row, scale)


def scale_rows(x: Tensor, weight_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `matmul_fp8.scale_rows_plain`; one program a row, which is read once."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    width = next_power_of_2(columns)
    warps = min(max(width // 1024, 4), 16)
    _scale_kernel[(rows,)](
        x, weight_scale, out, scales, columns, x.stride(0),
        SCALED=weight_scale is not None, WIDTH=width, num_warps=warps,
    )  # fmt: skip
    return out, scales


def decode_rows(weight: QuantizedWeight, out: Tensor, weight_scale: Tensor | None = None) -> None:
    """Writes the weight, times `weight_scale` [1], to `out` [rows, columns], whose rows may have gaps between them."""
    blocks = weight.rows * weight.columns // BLOCK
    grid = (cdiv(blocks, BLOCKS),)
    _rows_kernel[grid](
        *weight.tensors(), weight_scale, out, weight.columns, out.stride(0), blocks,
        NESTED=weight.is_nested, SCALED=weight_scale is not None, BLOCKS=BLOCKS,
    )  # fmt: skip


def decode_columns(weight: QuantizedWeight, out: Tensor, weight_scale: Tensor | None = None) -> None:
    """Writes the transposed weight, times `weight_scale` [1], to `out` [columns, rows]."""
    grid = (cdiv(weight.rows, TILE), weight.columns // BLOCK)
    _columns_kernel[grid](
        *weight.tensors(), weight_scale, out, weight.rows, weight.columns, out.stride(0),
        NESTED=weight.is_nested, SCALED=weight_scale is not None, TILE=TILE,
    )  # fmt: skip


def decode_experts(tensors: Sequence[Tensor], out: Tensor, weight_scale: Tensor | None = None) -> None:
    """Writes one projection of all experts, times `weight_scale` [1], to `out` [experts, rows, columns].

    `tensors` are those of a `QuantizedWeight`, each with one row an expert but for the two codebooks. `out` may be a
    part of a larger tensor, or a transposed view of one.
    """
    experts, rows, columns = out.shape
    options = {"NESTED": tensors[1].dtype is torch.uint8, "SCALED": weight_scale is not None}
    if out.stride(2) == 1:
        blocks = rows * columns // BLOCK
        _experts_kernel[(cdiv(blocks, BLOCKS), experts)](
            *tensors, weight_scale, out, columns, blocks, *out.stride()[:2], BLOCKS=BLOCKS, **options
        )
    else:
        _turned_experts_kernel[(cdiv(rows, TILE), columns // BLOCK, experts)](
            *tensors, weight_scale, out, rows, columns, *out.stride(), TILE=TILE, **options
        )
