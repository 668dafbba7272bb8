"""Matmuls with frozen 4-bit weights in 8-bit floats (e4m3), the adapter's part included."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.quantization.bnb4.quantized_weight import E4M3_MAX
from qlora.step.kernels.dequantize import dequantize, is_unread, join_tensors, operator
from qlora.upstream.torch import scaled_mm

WEIGHT_SCALE, AMAX_A, AMAX_B = slice(0, 1), slice(1, 2), slice(2, 3)
"""Where the `scales` of a group hold the factor of its weights, and the largest absolute values of its A and scaled B
matrices."""
ALIGNMENT = 16
"""The number of 8-bit numbers of which the columns of an operand must be a multiple."""


@functools.cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(1, count, device=device)


def _write_diagonal(out: Tensor, blocks: Sequence[Tensor]) -> None:
    """Writes the blocks along the diagonal of `out`, in 8 bits, and zeros beside them."""
    out = out.view(torch.int8)  # whose kernels are faster
    if len(blocks) > 1 or blocks[0].shape[1] < out.shape[1]:
        out.zero_()
    row = column = 0
    for block in blocks:
        height, width = block.shape
        out[row : row + height, column : column + width] = block.view(torch.int8)
        row, column = row + height, column + width


def _fake_matmul(x, scale, weight_scale, blocks, codes, rows, columns):
    return [x.new_empty(x.shape[0], count, dtype=torch.bfloat16) for count in rows]


@operator(
    "matmul_fp8(Tensor x, Tensor scale, Tensor weight_scale, Tensor[] blocks, Tensor[] codes, int[] rows, "
    "int columns) -> Tensor[]",
    _fake_matmul,
)
def matmul_fp8(
    x: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    blocks: list[Tensor],
    codes: list[Tensor],
    rows: list[int],
    columns: int,
) -> list[Tensor]:
    """Returns `x`, in e4m3, times the transposed weights of each layer of a group: tensors of bf16 [tokens, rows].

    The weights, in e4m3 too, are multiplied with `weight_scale` [1], the results with `scale` [tokens, 1]. `x` has
    additional columns, which are multiplied with the layers' adapter matrices `blocks`, in e4m3 [rows, ...]. Those of
    the first of several layers come left of the weights' `columns`, the others right of them; so there are zeros to
    multiply from the third layer on only.
    """
    if is_unread(codes):
        return [x.new_full((len(x), count), torch.nan, dtype=torch.bfloat16) for count in rows]
    left = blocks[0].shape[1] if len(rows) > 1 else 0
    right = x.shape[1] - left - columns
    weight = dequantize(join_tensors(codes, sum(rows), columns), x.dtype, weight_scale, left=left, right=right)
    if left:
        _write_diagonal(weight[: rows[0], :left], blocks[:1])
        _write_diagonal(weight[rows[0] :, left + columns :], blocks[1:])
    else:
        _write_diagonal(weight[:, columns:], blocks)
    ranges = [slice(0, left + columns)] if left else []
    ends = itertools.accumulate(block.shape[1] for block in blocks[len(ranges) :])
    ranges += [slice(left, left + columns + end) for end in ends]
    parts = zip(weight.split(rows), ranges, strict=True)
    return [_multiply_scaled(x[:, read], part[:, read], scale) for part, read in parts]


def _fake_transposed(dy, scale, weight_scale, block, codes, rows, columns):
    return dy.new_empty(dy.shape[0], columns, dtype=torch.bfloat16)


@operator(
    "matmul_fp8_transposed(Tensor dy, Tensor scale, Tensor weight_scale, Tensor? block, Tensor[] codes, int rows, "
    "int columns) -> Tensor",
    _fake_transposed,
)
def matmul_fp8_transposed(
    dy: Tensor, scale: Tensor, weight_scale: Tensor, block: Tensor | None, codes: list[Tensor], rows: int, columns: int
) -> Tensor:
    """Returns `dy`, in e4m3, times the weights [rows, columns]: bf16 [tokens, columns]; else like `matmul_fp8`.

    The columns of `dy` right of the weights' rows are multiplied with the matrix `block` [columns, ...].
    """
    right = dy.shape[1] - rows
    weight = dequantize(join_tensors(codes, rows, columns), dy.dtype, weight_scale, transposed=True, right=right)
    if block is not None:
        _write_diagonal(weight[:, rows:], [block])
    return _multiply_scaled(dy, weight, scale)


def _multiply_scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if not x.is_cuda:
        return ((x.float() @ weight.float().t()) * scale).bfloat16()
    ones = _ones(len(weight), x.device)
    return scaled_mm(x, weight.t(), scale_a=scale, scale_b=ones, out_dtype=torch.bfloat16, use_fast_accum=True)


def scale_parts(parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Does what `scale_rows` does for a matrix in parts; compiled code scales where it computes them."""
    if torch.compiler.is_compiling():
        return _scale_parts_plain(parts)
    x, scale = scale_rows(torch.cat(tuple(parts), 1) if parts[1:] else parts[0])
    return [x], scale


def _scale_parts_plain(parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    amax = [part.abs().amax(1, keepdim=True) for part in parts]
    scale = functools.reduce(torch.maximum, amax).float().clamp(min=1e-12) / E4M3_MAX
    return [(part.float() / scale).to(torch.float8_e4m3fn) for part in parts], scale


def scale_rows_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of `scale_rows`."""
    (scaled,), scale = _scale_parts_plain([x])
    return scaled, scale


def _fake_scale(x):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@operator("scale_rows(Tensor x) -> (Tensor, Tensor)", _fake_scale)
def scale_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `x` [tokens, columns] in e4m3, each row scaled to the range, and the divisors, float32 [tokens, 1]."""
    if not x.is_cuda:
        return scale_rows_plain(x)
    from qlora.quantization.bnb4.decode_kernels import scale_rows as kernel

    return kernel(x)


class ScaledOperands(NamedTuple):
    """The operands of a matmul in e4m3, and the scale of its result."""

    parts: list[Tensor]
    extra: list[Tensor]
    """For each adapter the additional columns of the first operand, [tokens, ...]."""
    blocks: list[Tensor]
    """For each adapter the additional columns of the weights."""
    scale: Tensor
    """The factor of the result, float32 [tokens, 1]."""
    weight_scale: Tensor
    """The factor that the weights must be multiplied with, [1]."""


def scale_operands(
    parts: Sequence[Tensor], half: Tensor | None, others: Sequence[Tensor], weight_scale: Tensor, amax: Tensor
) -> ScaledOperands:
    """Returns in e4m3 a matrix in `parts`, and beside it the columns of `half` with their matrices `others`.

    Each number of these two is the sum of two 8-bit numbers, the second of which is the rounding error of the first;
    that is about as exact as 16 bits. So that neither leaves the range of 8 bits, `half` is divided by the largest
    ratio of its numbers to the largest number in their row of `parts`, and `others`, whose largest absolute value is
    `amax` [1], are multiplied with that ratio. For the sake of `others`, `weight_scale` may shrink.
    """
    scaled, scale = scale_parts(parts)
    if half is None:
        return ScaledOperands(scaled, [], [], scale / weight_scale, weight_scale)
    reach = (half.abs().amax(1, keepdim=True) / scale).amax().clamp(min=1e-12) / E4M3_MAX
    weight_scale = torch.minimum(weight_scale, E4M3_MAX / (reach * amax).clamp(min=1e-12))
    extra, blocks = [], []
    for columns, other in zip(half.split([matrix.shape[1] for matrix in others], 1), others, strict=True):
        (first, rest), (top, lost) = (
            _split(columns.float() / (scale * reach)),
            _split(other.float() * (weight_scale * reach)),
        )
        missing = -3 * columns.shape[1] % ALIGNMENT
        operand, block = torch.cat([first, rest, first], 1), torch.cat([top, top, lost], 1)
        extra.append(torch.nn.functional.pad(operand, (0, missing)) if missing else operand)
        blocks.append(torch.nn.functional.pad(block, (0, missing)) if missing else block)
    return ScaledOperands(scaled, extra, blocks, scale / weight_scale, weight_scale)


def multiply_fp8(
    x: Tensor, xa: Tensor, b: Sequence[Tensor], scales: Tensor, codes: list[Tensor], rows: list[int]
) -> list[Tensor]:
    """Returns the outputs of `linear`, by matmuls in e4m3."""
    (scaled,), extra, blocks, scale, weight_scale = scale_operands([x], xa, b, scales[WEIGHT_SCALE], scales[AMAX_B])
    left = extra[:1] if len(rows) > 1 else []
    joined = torch.cat([*left, scaled, *extra[len(left) :]], 1)
    return matmul_fp8(joined, scale, weight_scale, blocks, codes, rows, x.shape[1])


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two tensors in e4m3 whose sum is nearly `x`."""
    first = x.to(torch.float8_e4m3fn)
    return first, (x - first.float()).to(first.dtype)
