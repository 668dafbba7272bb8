"""The plain forward pass of a layer's experts, with adapters on them.

What computes a layer is looked up by a name in the model's config: `use_experts` enters ours, whatever stores the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.experts.grouped import Routing, grouped_linear, grouped_mm, permute, unpermute
from qlora.experts.layout import DOWN, ExpertsLayout, expert_weight, find_experts, is_stored
from qlora.upstream.transformers_experts import apply_gate, register_experts, set_experts_implementation

IMPLEMENTATION = "qlora"
"""The name of `run_experts` in transformers' `ExpertsInterface`."""
ADAPTERS = "expert_adapters"
"""The attribute of an experts module that holds its adapters by the names of projections."""


@dataclass
class ExpertAdapter:
    """LoRA on one projection of all experts of a layer: what an expert computes gains `scaling * B A x`."""

    a: Tensor
    """[experts, r, in]"""
    b: Tensor
    """[experts, out, r], its rows in the order of the projection."""
    scaling: float
    dropout: float = 0.0
    """The share of the inputs that are dropped in training, by row of a token and expert."""
    is_enabled: Callable[[], bool] = lambda: True
    """Says whether the adapter takes part in this forward pass."""


def use_experts(model: nn.Module) -> None:
    """Makes `run_experts` compute the experts of a model."""
    register_experts(IMPLEMENTATION, run_experts)
    for experts in find_experts(model).values():
        set_experts_implementation(experts, IMPLEMENTATION)


def run_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Returns what the experts of a layer make of hidden states, [tokens, hidden].

    `top_k_index` names the experts of each token and `top_k_weights` what each counts, both [tokens, k].
    """
    layout = ExpertsLayout.of(experts)
    routing = Routing.sort(top_k_index, layout.count)
    rows = permute(hidden.to(compute_dtype(experts, hidden)), routing)
    first, down = layout.projections
    rows = apply_gate(experts, run_projection(experts, first, rows, routing))
    rows = run_projection(experts, down, rows, routing)
    if layout.has_post_norm:
        module: Any = experts
        rows = module.post_expert_norm(rows)
    weighted = unpermute(rows, routing) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden.dtype)


def run_projection(experts: nn.Module, name: str, rows: Tensor, routing: Routing) -> Tensor:
    """Returns the outputs of one projection, [rows, out], with its bias and its adapter."""
    weight: Tensor = getattr(experts, name)
    if weight.requires_grad:
        output = grouped_linear(rows, expert_weight(experts, name, rows.dtype), routing.offsets)
    else:
        output = FrozenProjection.apply(rows, experts, name, routing)
    if (bias := getattr(experts, f"{name}_bias", None)) is not None:
        output = output + bias.to(rows.dtype)[routing.experts]
    adapter: ExpertAdapter | None = experts.__dict__.get(ADAPTERS, {}).get(name)
    if adapter is not None and adapter.is_enabled():
        output = output + run_adapter(adapter, rows, routing, is_training=experts.training)
    return output


class FrozenProjection(torch.autograd.Function):
    """A matmul with weights that are decoded again in the backward pass, and never kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, experts: nn.Module, name: str, routing: Routing) -> Tensor:
        ctx.inputs = experts, name, routing, rows.dtype
        weight, offsets = _routed_weight(experts, name, rows.dtype, routing)
        return grouped_mm(rows, weight.transpose(1, 2), offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        experts, name, routing, dtype = ctx.inputs
        weight, offsets = _routed_weight(experts, name, dtype, routing)
        return grouped_mm(grad.contiguous(), weight, offsets), None, None, None


def _routed_weight(experts: nn.Module, name: str, dtype: torch.dtype, routing: Routing) -> tuple[Tensor, Tensor]:
    """Returns a projection and the row behind the last of each expert; where few have rows, only theirs is decoded."""
    if routing.is_sparse and is_stored(experts, name):
        active, offsets = routing.active
        return expert_weight(experts, name, dtype, active), offsets
    return expert_weight(experts, name, dtype), routing.offsets


def run_adapter(adapter: ExpertAdapter, rows: Tensor, routing: Routing, *, is_training: bool) -> Tensor:
    """Returns what an adapter adds to a projection's outputs."""
    rows = nn.functional.dropout(rows, adapter.dropout, is_training)
    low = grouped_linear(rows, adapter.a.to(rows.dtype), routing.offsets)
    return grouped_linear(low, adapter.b.to(rows.dtype), routing.offsets) * adapter.scaling


def compute_dtype(experts: nn.Module, hidden: Tensor) -> torch.dtype:
    """Returns the dtype of the matmuls: that of autocast, or of the weights."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    weight: Tensor = getattr(experts, DOWN)
    return weight.dtype
