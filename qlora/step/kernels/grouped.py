"""Functions of the routed rows of a mixture: each token's row once for every expert it is sent to, sorted by expert.

All of them are deterministic: rows are sorted stably, and sums run in a fixed order. Triton kernels compute them on a
GPU, else their twins do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.experts.grouped import grouped_mm, grouped_outer
from qlora.step.kernels.dequantize import operator


class Routing(NamedTuple):
    """Which rows belong to which expert."""

    order: Tensor
    """int64 [rows]: the pick, `token * picks + k`, of each row."""
    source: Tensor
    """int32 [rows]: the token of each row."""
    positions: Tensor
    """int32 [tokens, picks]: the row of each pick."""
    offsets: Tensor
    """int32 [experts]: the end of each expert's rows."""


def _fake_route(index, experts):
    rows = index.numel()
    return [
        index.new_empty(rows, dtype=torch.int64),
        index.new_empty(rows, dtype=torch.int32),
        index.new_empty(index.shape, dtype=torch.int32),
        index.new_empty(experts, dtype=torch.int32),
    ]


def route_plain(index: Tensor, experts: int) -> list[Tensor]:
    """Returns the tensors of a `Routing`."""
    picks = index.reshape(-1)
    experts_in_order, order = torch.sort(picks, stable=True)
    ends = torch.arange(experts, device=index.device, dtype=picks.dtype)
    offsets = torch.searchsorted(experts_in_order, ends, right=True, out_int32=True)
    positions = torch.empty_like(order, dtype=torch.int32)
    positions[order] = torch.arange(len(order), device=index.device, dtype=torch.int32)
    source = torch.div(order, index.shape[-1], rounding_mode="floor").int()
    return [order, source, positions.view(index.shape), offsets]


@operator("route_tokens(Tensor index, int experts) -> Tensor[]", _fake_route)
def _route_tokens(index: Tensor, experts: int) -> list[Tensor]:
    if not index.is_cuda:
        return route_plain(index, experts)
    from qlora.step.kernels import grouped_kernels  # Triton is there with CUDA only

    out = _fake_route(index, experts)
    grouped_kernels.route(index.contiguous(), *out)
    return out


def route_tokens(index: Tensor, experts: int) -> Routing:
    """Sorts the picks `index` [tokens, picks], each the number of an expert, by expert; equal ones keep their order."""
    return Routing(*_route_tokens(index, experts))


def matmul_plain(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
    *,
    source: Tensor | None = None,
    scale: Tensor | None = None,
    xa: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """Returns each row times the transposed weight of its expert, plus the adapter's part: `dtype` [rows, columns].

    `x` [rows, depth], or with `source` [tokens, depth]; `weight` [experts, columns, depth]; `scale` [of x, 1]
    multiplies the products of `x`'s rows; `xa` [rows, rank] is multiplied with `b` [experts, columns, rank].
    """
    out = grouped_mm(_rows_of(x, source).float(), weight.float().transpose(1, 2), offsets)
    if scale is not None:
        out = out * _rows_of(scale, source)
    if xa is not None and b is not None:
        out = out + grouped_mm(xa.float(), b.float().transpose(1, 2), offsets)
    return out.to(dtype)


def _rows_of(x: Tensor, source: Tensor | None) -> Tensor:
    return x if source is None else x[source.long()]


def matmul(
    x: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype, *, source: Tensor | None = None, **more: Any
) -> Tensor:
    """As `matmul_plain`."""
    if not x.is_cuda:
        return matmul_plain(x, weight, offsets, dtype, source=source, **more)
    from qlora.step.kernels import grouped_kernels  # Triton is there with CUDA only

    out = torch.empty((x if source is None else source).shape[0], weight.shape[1], dtype=dtype, device=x.device)
    grouped_kernels.matmul(x, weight, offsets, out, source=source, **more)
    return out


def multiply_low_rank(x: Tensor, a: Tensor, offsets: Tensor, source: Tensor | None) -> Tensor:
    """Returns each row of `x`, as in `matmul_plain`, times the A matrix of its expert, `a` [experts, rank, depth]."""
    if not x.is_cuda:
        return matmul_plain(x, a, offsets, x.dtype, source=source)
    from qlora.step.kernels import grouped_kernels

    out = torch.empty((x if source is None else source).shape[0], a.shape[1], dtype=x.dtype, device=x.device)
    grouped_kernels.multiply_low_rank(x, a, offsets, source, out)
    return out


def sum_rows_plain(low_rank: Tensor, x: Tensor, offsets: Tensor, source: Tensor | None) -> Tensor:
    """Returns for each expert `low_rank` [rows, rank] transposed times its rows of `x`: [experts, rank, columns]."""
    return grouped_outer(low_rank.float(), _rows_of(x, source).float(), offsets).to(x.dtype)


def sum_rows(
    low_rank: Tensor, x: Tensor, offsets: Tensor, source: Tensor | None, *, transposed: bool = False
) -> Tensor:
    """As `sum_rows_plain`, or its transpose [experts, columns, rank]."""
    if not x.is_cuda:
        plain = sum_rows_plain(low_rank, x, offsets, source)
        return plain.transpose(1, 2).contiguous() if transposed else plain
    from qlora.step.kernels import grouped_kernels

    shape = (low_rank.shape[1], x.shape[1])
    out = torch.empty(offsets.shape[0], *(shape[::-1] if transposed else shape), dtype=x.dtype, device=x.device)
    grouped_kernels.sum_rows(low_rank, x, offsets, source, out.transpose(1, 2) if transposed else out)
    return out


def combine_plain(rows: Tensor, positions: Tensor) -> Tensor:
    """Returns for each token the sum of its `rows` [rows, columns] at `positions` [tokens, picks], in their order."""
    return rows[positions.long()].float().sum(1).to(rows.dtype)


def combine(rows: Tensor, positions: Tensor) -> Tensor:
    """As `combine_plain`."""
    if not rows.is_cuda:
        return combine_plain(rows, positions)
    from qlora.step.kernels import grouped_kernels

    out = torch.empty(positions.shape[0], rows.shape[1], dtype=rows.dtype, device=rows.device)
    grouped_kernels.combine(rows, positions, out)
    return out


class SortWeights(torch.autograd.Function):
    """The routing weights [tokens, picks] in the order of the rows, [rows, 1]; unlike indexing, nothing is summed."""

    @staticmethod
    def forward(ctx, weights, order, positions):
        """Returns the weight of each row."""
        ctx.save_for_backward(positions)
        return weights.reshape(-1)[order, None]

    @staticmethod
    def backward(ctx, gradient):
        """Returns the gradient with respect to the weights."""
        (positions,) = ctx.saved_tensors
        return gradient.reshape(-1)[positions.long()], None, None
