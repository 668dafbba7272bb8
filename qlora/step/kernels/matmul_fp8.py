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


def _copy(block: Tensor, out: Tensor) -> None:
    out.view(torch.int8).copy_(block.view(torch.int8))  # whose kernels are faster


def _join_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Returns a matrix with the blocks along its diagonal, and zeros beside them."""
    if len(blocks) == 1:
        return blocks[0]
    width, start, rows = sum(block.shape[1] for block in blocks), 0, []
    for block in blocks:
        end = start + block.shape[1]
        rows.append(torch.nn.functional.pad(block, (start, width - end)))
        start = end
    return torch.cat(rows)


def _fake_matmul(x, scale, weight_scale, left, right, widths, codes, rows, columns):
    return [x.new_empty(x.shape[0], count, dtype=torch.bfloat16) for count in rows]


@operator(
    "matmul_fp8(Tensor x, Tensor scale, Tensor weight_scale, Tensor? left, Tensor right, int[] widths, Tensor[] codes, "
    "int[] rows, int columns) -> Tensor[]",
    _fake_matmul,
)
def matmul_fp8(
    x: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    left: Tensor | None,
    right: Tensor,
    widths: list[int],
    codes: list[Tensor],
    rows: list[int],
    columns: int,
) -> list[Tensor]:
    """Returns `x`, in e4m3, times the transposed weights of each layer of a group: tensors of bf16 [tokens, rows].

    The weights, in e4m3 too, are multiplied with `weight_scale` [1], the results with `scale` [tokens, 1]. `x` has
    additional columns, which are multiplied with the layers' adapter matrices, in e4m3 [rows, ...]. Those of the first
    of several layers, `left`, come left of the weights' `columns`, the others right of them; so there are zeros to
    multiply from the third layer on only. `right` has those others along its diagonal, `widths` their columns.
    """
    if is_unread(codes):
        return [x.new_full((len(x), count), torch.nan, dtype=torch.bfloat16) for count in rows]
    begin = 0 if left is None else left.shape[1]
    end = begin + columns
    weight = dequantize(
        join_tensors(codes, sum(rows), columns), x.dtype, weight_scale, left=begin, right=right.shape[1]
    )
    if left is None:
        _copy(right, weight[:, end:])
        ranges = []
    else:
        _copy(left, weight[: rows[0], :begin])
        _copy(right, weight[rows[0] :, end:])
        ranges = [(0, end)]
    ranges += [(begin, end + width) for width in itertools.accumulate(widths)]
    parts = zip(weight.split(rows), ranges, strict=True)
    return [_multiply_scaled(x[:, start:stop], part[:, start:stop], scale) for part, (start, stop) in parts]


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
        _copy(block, weight[:, rows:])
    return _multiply_scaled(dy, weight, scale)


def _multiply_scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if not x.is_cuda:
        return ((x.float() @ weight.float().t()) * scale).bfloat16()
    ones = _ones(weight.shape[0], x.device)
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


def scale_rows_plain(x: Tensor, weight_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The twin of `scale_rows`."""
    (scaled,), scale = _scale_parts_plain([x])
    return scaled, scale if weight_scale is None else scale / weight_scale


def _fake_scale(x, weight_scale=None):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@operator("scale_rows(Tensor x, Tensor? weight_scale=None) -> (Tensor, Tensor)", _fake_scale)
def scale_rows(x: Tensor, weight_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns `x` [tokens, columns] in e4m3, each row scaled to the range, and the factors of results, [tokens, 1].

    The factors, in float32, are the divisors of the rows, divided by the factor `weight_scale` [1] of the weights.
    """
    if not x.is_cuda:
        return scale_rows_plain(x, weight_scale)
    from qlora.quantization.bnb4.decode_kernels import scale_rows as kernel

    return kernel(x, weight_scale)


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
    first = 1 if len(rows) > 1 else 0
    joined = torch.cat([*extra[:first], scaled, *extra[first:]], 1)
    left, right = next(iter(blocks[:first]), None), _join_diagonal(blocks[first:])
    widths = [block.shape[1] for block in blocks[first:]]
    return matmul_fp8(joined, scale, weight_scale, left, right, widths, codes, rows, x.shape[1])


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two tensors in e4m3 whose sum is nearly `x`."""
    first = x.to(torch.float8_e4m3fn)
    return first, (x - first.float()).to(first.dtype)
