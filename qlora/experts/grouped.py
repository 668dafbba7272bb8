"""Rows sorted by expert, and matmuls of each group of rows with the matrix of its expert.

The plain twin of what GPU kernels do: no atomics anywhere, so the same input always gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.upstream.torch_experts import grouped_mm_kernel, takes_grouped_mm


@dataclass(frozen=True)
class Routing:
    """Which expert computes which token; a row is a token for one of its `k` experts, sorted by expert."""

    order: Tensor
    """int64 [rows]: of each sorted row its index among the unsorted, tokens slowest."""
    experts: Tensor
    """int64 [rows]: the expert of each sorted row."""
    offsets: Tensor
    """int32 [experts]: the row behind the last of each expert."""
    k: int
    """Experts a token."""

    @classmethod
    def sort(cls, top_k_index: Tensor, count: int) -> Routing:
        """Sorts the rows of `top_k_index` [tokens, k] by expert; those of one expert keep their order."""
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        ids = torch.arange(count, device=experts.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, ids, right=True, out_int32=True)
        return cls(order, experts, offsets, top_k_index.shape[-1])

    @property
    def is_sparse(self) -> bool:
        """Whether there are fewer rows than experts, so that some experts compute nothing."""
        return len(self.order) < len(self.offsets)

    @cached_property
    def inverse(self) -> Tensor:
        """int64 [rows]: of each unsorted row its index among the sorted."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(self.order), device=self.order.device)
        return inverse

    @cached_property
    def active(self) -> tuple[Tensor, Tensor]:
        """The experts that have rows, int64 [active], and the row behind the last of each, int32 [active]."""
        active = self.experts.unique_consecutive()
        return active, self.offsets[active]


def permute(hidden: Tensor, routing: Routing) -> Tensor:
    """Returns the rows [rows, hidden] of tokens [tokens, hidden], sorted by expert."""
    rows: Tensor = _Permute.apply(hidden, routing)
    return rows


def unpermute(rows: Tensor, routing: Routing) -> Tensor:
    """Returns sorted rows as [tokens, k, hidden]."""
    unsorted: Tensor = _Unpermute.apply(rows, routing)
    return unsorted.view(-1, routing.k, rows.shape[-1])


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return hidden[routing.order // routing.k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.routing.inverse].view(-1, ctx.routing.k, grad.shape[-1]).sum(1), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return rows[routing.inverse]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.routing.order], None


def grouped_linear(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Returns rows [rows, in] times the weight of their group, [groups, out, in]; both may be trained."""
    output: Tensor = _GroupedLinear.apply(rows, weights, offsets)
    return output


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, offsets)
        return grouped_mm(rows, weights.transpose(1, 2), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        rows_grad = grouped_mm(grad, weights, offsets) if ctx.needs_input_grad[0] else None
        weights_grad = grouped_outer(grad, rows, offsets) if ctx.needs_input_grad[1] else None
        return rows_grad, weights_grad, None


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Returns rows [rows, in] times the matrix of their group, [groups, in, out]."""
    if takes_grouped_mm(rows, weights):
        return grouped_mm_kernel(rows, weights, offsets)
    output = rows.new_empty(len(rows), weights.shape[2])
    for group, (start, stop) in _groups(offsets):
        torch.mm(rows[start:stop], weights[group], out=output[start:stop])
    return output


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Returns the sum of the outer products of each group's rows, [groups, left, right]: a weight's gradient."""
    if takes_grouped_mm(left.t(), right):
        output = grouped_mm_kernel(left.t(), right, offsets)
        sizes = offsets.diff(prepend=offsets.new_zeros(1))
        return output.masked_fill_((sizes == 0)[:, None, None], 0)  # a kernel may leave out what has no rows
    output = left.new_zeros(len(offsets), left.shape[1], right.shape[1])
    for group, (start, stop) in _groups(offsets):
        torch.mm(left[start:stop].t(), right[start:stop], out=output[group])
    return output


def _groups(offsets: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Returns the groups that have rows, with the first of these and the one behind the last."""
    stops = offsets.tolist()
    spans = zip([0, *stops[:-1]], stops, strict=True)
    return [(group, (start, stop)) for group, (start, stop) in enumerate(spans) if stop > start]
