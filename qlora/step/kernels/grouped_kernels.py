"""Triton kernels of a mixture's experts: matmuls of sorted rows, each with the matrix of its own expert.

Rows lie sorted by expert; `offsets` [experts] is the end of each expert's rows. Every program finds the expert of its
tile by itself, so nothing waits for the host to learn how many rows an expert has. `grouped` has the twins;
`TRITON_INTERPRET=1` runs the kernels on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.upstream.triton import cdiv, cheap_launch, next_power_of_2

ROWS, COLUMNS, ORDER = 128, 256, 8
"""The tile of a matmul, and how many row tiles share the columns of a weight while these are in the cache."""
DEPTH_BYTES = 128
"""Bytes of a row that one iteration of a matmul multiplies: 64 numbers of 16 bits, 128 of 8 bits."""
LOW_RANK_ROWS, LOW_RANK_DEPTH = 64, 128
"""The tile of a product with an adapter's A matrix."""
SUM_COLUMNS, SUM_DEPTH = 128, 64
"""The tile of a gradient with respect to an adapter's matrix, and how many rows it sums at a time."""
SORT_PICKS, SORT_EXPERTS, SORT_TILES = 128, 128, 1024
"""The picks of a tile that are sorted, and of how many experts and tiles the picks are counted at a time."""


@triton.jit
def _find_tile(offsets, tile, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Returns the expert of a tile, its first row, the end of its expert's rows, and whether there is such a tile."""
    index = tl.arange(0, EXPERTS)
    end = tl.load(offsets + index, mask=index < experts, other=0)
    start = tl.load(offsets + index - 1, mask=(index > 0) & (index < experts), other=0)
    count = tl.where(index < experts, (end - start + ROWS - 1) // ROWS, 0)
    after = tl.cumsum(count, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    is_mine = index == expert
    row = tl.sum(tl.where(is_mine, start + (tile - (after - count)) * ROWS, 0), 0)
    return expert, row, tl.sum(tl.where(is_mine, end, 0), 0), tile < tl.sum(count, 0)


@cheap_launch
@triton.jit
def _matmul_kernel(
    x, source, weight, xa, b, scale, out, offsets, experts, columns, depth, x_stride, expert_stride, column_stride,
    depth_stride, out_stride, b_expert_stride, b_column_stride, b_rank_stride,
    RANK: tl.constexpr, GATHERED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, ORDER: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    width = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    first = program // (ORDER * width) * ORDER
    high = tl.minimum(tl.num_programs(0) // width - first, ORDER)
    tile = first + program % (ORDER * width) % high
    expert, row, end, exists = _find_tile(offsets, tile, experts, ROWS, EXPERTS)
    if not exists:
        return
    rows = row + tl.arange(0, ROWS)
    is_row = rows < end
    if GATHERED:
        read = tl.load(source + rows, mask=is_row, other=0).to(tl.int64)
    else:
        read = tl.where(is_row, rows, row).to(tl.int64)
    column = program % (ORDER * width) // high * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    # What is read past the last column is not stored. Without a need for it, the compiler knows neighbours by it.
    safe = column if EVEN_COLUMNS else tl.where(is_column, column, 0)
    step = tl.arange(0, DEPTH)
    x_pointer = x + read[:, None] * x_stride + step[None, :]
    weight_pointer = weight + expert.to(tl.int64) * expert_stride
    weight_pointer += safe[None, :] * column_stride + step[:, None] * depth_stride
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            total = tl.dot(tl.load(x_pointer), tl.load(weight_pointer), total)
        else:
            inside = step < depth - start
            total = tl.dot(
                tl.load(x_pointer, mask=inside[None, :], other=0.0),
                tl.load(weight_pointer, mask=inside[:, None], other=0.0),
                total,
            )
        x_pointer += DEPTH
        weight_pointer += DEPTH * depth_stride
    if SCALED:
        total = total * tl.load(scale + read)[:, None]
    if RANK > 0:
        rank = tl.arange(0, RANK)
        left = tl.load(xa + rows.to(tl.int64)[:, None] * RANK + rank[None, :], mask=is_row[:, None], other=0.0)
        right = tl.load(
            b + expert.to(tl.int64) * b_expert_stride + safe[None, :] * b_column_stride + rank[:, None] * b_rank_stride
        )
        total = tl.dot(left, right, total)
    target = out + rows.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@cheap_launch
@triton.jit
def _low_rank_kernel(
    x, source, a, out, offsets, experts, depth, x_stride, expert_stride, rank_stride, depth_stride,
    RANK: tl.constexpr, GATHERED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    expert, row, end, exists = _find_tile(offsets, tl.program_id(0), experts, ROWS, EXPERTS)
    if not exists:
        return
    rows = row + tl.arange(0, ROWS)
    is_row = rows < end
    if GATHERED:
        read = tl.load(source + rows, mask=is_row, other=0).to(tl.int64)
    else:
        read = tl.where(is_row, rows, row).to(tl.int64)
    rank, step = tl.arange(0, RANK), tl.arange(0, DEPTH)
    base = a + expert.to(tl.int64) * expert_stride + rank[None, :] * rank_stride
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + step
        inside = at < depth
        total = tl.dot(
            tl.load(x + read[:, None] * x_stride + at[None, :], mask=inside[None, :], other=0.0),
            tl.load(base + at[:, None] * depth_stride, mask=inside[:, None], other=0.0),
            total,
        )
    target = out + rows.to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_row[:, None])


@cheap_launch
@triton.jit
def _sum_kernel(
    low_rank, x, source, out, offsets, columns, x_stride, expert_stride, rank_stride, column_stride,
    RANK: tl.constexpr, GATHERED: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    end = tl.load(offsets + expert)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    rank = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for row in range(start, end, DEPTH):
        rows = row + tl.arange(0, DEPTH)
        is_row = rows < end
        read = (tl.load(source + rows, mask=is_row, other=0) if GATHERED else rows).to(tl.int64)
        left = tl.load(low_rank + rows.to(tl.int64)[None, :] * RANK + rank[:, None], mask=is_row[None, :], other=0.0)
        right = tl.load(
            x + read[:, None] * x_stride + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
        )
        total = tl.dot(left, right, total)
    target = out + expert.to(tl.int64) * expert_stride + rank[:, None] * rank_stride + column[None, :] * column_stride
    tl.store(target, total.to(out.dtype.element_ty), mask=is_column[None, :])


@cheap_launch
@triton.jit
def _combine_kernel(rows, positions, out, columns, PICKS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for pick in tl.static_range(PICKS):
        row = tl.load(positions + token * PICKS + pick).to(tl.int64)
        total += tl.load(rows + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


@cheap_launch
@triton.jit
def _count_kernel(picks, counts, rows, experts, PICKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts the picks of each expert in a tile."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    at = tile * PICKS + tl.arange(0, PICKS)
    pick = tl.load(picks + at, mask=at < rows, other=-1).to(tl.int32)
    for first in range(0, experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        count = tl.sum((expert[:, None] == pick[None, :]).to(tl.int32), 1)
        tl.store(counts + expert.to(tl.int64) * (tiles + 1) + tile, count, mask=expert < experts)


@cheap_launch
@triton.jit
def _sum_counts_kernel(counts, tiles, TILES: tl.constexpr):
    """Replaces an expert's counts by those of all tiles before, and writes the sum of all behind them."""
    counts += tl.program_id(0).to(tl.int64) * (tiles + 1)
    total = tl.zeros((), dtype=tl.int32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        count = tl.load(counts + tile, mask=tile < tiles, other=0)
        tl.store(counts + tile, total + tl.cumsum(count, 0) - count, mask=tile < tiles)
        total += tl.sum(count, 0)
    tl.store(counts + tiles, total)


@cheap_launch
@triton.jit
def _place_kernel(
    picks, counts, order, source, positions, offsets, rows, experts, tiles, a_token,
    PICKS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes the rows of a tile's picks, and the end of the rows of the expert that has the number of the program."""
    program = tl.program_id(0)
    index = tl.arange(0, PICKS)
    at = program * PICKS + index
    is_pick = at < rows
    pick = tl.load(picks + at, mask=is_pick, other=-1).to(tl.int32)
    # The same picks along the other axis: of each one, how many before it in the tile are of its expert.
    others = tl.load(picks + at[None, :], mask=is_pick[None, :], other=-1).to(tl.int32)
    is_before = (others == pick[:, None]) & (index[None, :] < index[:, None])
    row = tl.sum(is_before.to(tl.int32), 1)
    row += tl.load(counts + pick.to(tl.int64) * (tiles + 1) + program, mask=is_pick, other=0)
    end = tl.zeros((), dtype=tl.int32)
    for first in range(0, experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        total = tl.load(counts + expert.to(tl.int64) * (tiles + 1) + tiles, mask=expert < experts, other=0)
        row += tl.sum(tl.where(expert[None, :] < pick[:, None], total[None, :], 0), 1)
        end += tl.sum(tl.where(expert <= program, total, 0), 0)
    tl.store(order + row, at.to(tl.int64), mask=is_pick)
    tl.store(source + row, at // a_token, mask=is_pick)
    tl.store(positions + at, row, mask=is_pick)
    tl.store(offsets + program, end, mask=program < experts)


def route(index: Tensor, order: Tensor, source: Tensor, positions: Tensor, offsets: Tensor) -> None:
    """As `grouped.route_plain`, into the tensors of a `Routing`."""
    rows, experts = index.numel(), offsets.shape[0]
    tiles = cdiv(rows, SORT_PICKS)
    counts = torch.empty(experts, tiles + 1, dtype=torch.int32, device=index.device)
    _count_kernel[(tiles,)](index, counts, rows, experts, PICKS=SORT_PICKS, EXPERTS=SORT_EXPERTS, num_warps=4)
    _sum_counts_kernel[(experts,)](counts, tiles, TILES=SORT_TILES, num_warps=4)
    _place_kernel[(max(tiles, experts),)](
        index, counts, order, source, positions, offsets, rows, experts, tiles, index.shape[-1],
        PICKS=SORT_PICKS, EXPERTS=SORT_EXPERTS, num_warps=4,
    )  # fmt: skip


def matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    source: Tensor | None = None,
    scale: Tensor | None = None,
    xa: Tensor | None = None,
    b: Tensor | None = None,
) -> None:
    """As `grouped.matmul_plain`, into `out` [rows, columns]."""
    (rows, columns), (experts, _, depth) = out.shape, weight.shape
    step = DEPTH_BYTES // x.element_size()
    high = min(ROWS, max(16, next_power_of_2(rows)))
    width = min(COLUMNS, max(16, next_power_of_2(columns)))
    step = min(step, max(32 if x.element_size() == 1 else 16, next_power_of_2(depth)))
    tiles = cdiv(rows, high) + experts
    b_strides = (0, 0, 0) if b is None else b.stride()
    _matmul_kernel[(tiles * cdiv(columns, width),)](
        x, source, weight, xa, b, scale, out, offsets, experts, columns, depth, x.stride(0), *weight.stride(),
        out.stride(0), *b_strides, RANK=0 if xa is None else xa.shape[1], GATHERED=source is not None,
        SCALED=scale is not None, ROWS=high, COLUMNS=width, DEPTH=step, ORDER=ORDER,
        EXPERTS=next_power_of_2(experts), EVEN=depth % step == 0, EVEN_COLUMNS=columns % width == 0, num_warps=8,
        num_stages=4 if x.element_size() == 2 else 3,
    )  # fmt: skip


def multiply_low_rank(x: Tensor, a: Tensor, offsets: Tensor, source: Tensor | None, out: Tensor) -> None:
    """As `grouped.multiply_low_rank`, into `out` [rows, rank]."""
    rows, (experts, rank, depth) = out.shape[0], a.shape
    _low_rank_kernel[(cdiv(rows, LOW_RANK_ROWS) + experts,)](
        x, source, a, out, offsets, experts, depth, x.stride(0), *a.stride(),
        RANK=rank, GATHERED=source is not None, ROWS=LOW_RANK_ROWS, DEPTH=LOW_RANK_DEPTH,
        EXPERTS=next_power_of_2(experts), num_warps=4, num_stages=3,
    )  # fmt: skip


def sum_rows(low_rank: Tensor, x: Tensor, offsets: Tensor, source: Tensor | None, out: Tensor) -> None:
    """As `grouped.sum_rows_plain`, into `out` [experts, rank, columns], which may be a transposed view."""
    experts, rank, columns = out.shape
    _sum_kernel[(experts, cdiv(columns, SUM_COLUMNS))](
        low_rank, x, source, out, offsets, columns, x.stride(0), *out.stride(),
        RANK=rank, GATHERED=source is not None, COLUMNS=SUM_COLUMNS, DEPTH=SUM_DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip


def combine(rows: Tensor, positions: Tensor, out: Tensor) -> None:
    """As `grouped.combine_plain`, into `out` [tokens, columns]."""
    tokens, columns = out.shape
    width = min(1024, next_power_of_2(columns))
    _combine_kernel[(tokens, cdiv(columns, width))](
        rows, positions, out, columns, PICKS=positions.shape[1], COLUMNS=width, num_warps=4
    )
