"""Mixtures of experts: the layout of a layer's experts, their weights, and the plain forward pass with adapters.

A projection is [experts, out, in] throughout, its rows in the order that the module's own gate expects. What computes a
layer is looked up by a name in the model's config: `use_experts` enters ours, whatever stores the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.models.grouped import Routing, grouped_linear, grouped_mm, permute, unpermute
from qlora.upstream.transformers_experts import (
    apply_gate,
    gate_is_interleaved,
    has_post_norm,
    is_experts,
    register_experts,
    set_experts_implementation,
)

IMPLEMENTATION = "qlora"
"""The name of `run_experts` in transformers' `ExpertsInterface`."""
ADAPTERS = "expert_adapters"
"""The attribute of an experts module that holds its adapters by the names of projections."""
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module keeps the experts of a layer."""

    count: int
    """Experts."""
    hidden: int
    """Inputs of an expert."""
    intermediate: int
    """Inputs of the down projection."""
    output: int
    """Outputs of an expert."""
    has_gate: bool
    """Whether the first projection is `gate_up_proj`, twice as tall as `up_proj` would be."""
    has_bias: bool
    is_transposed: bool
    """Whether the parameters are [experts, in, out]."""
    is_interleaved: bool
    """Whether the rows of gate and up alternate; otherwise all of gate come first."""
    has_post_norm: bool
    """Whether each expert's output is normalised before the routing weights."""

    @classmethod
    def of(cls, experts: nn.Module) -> ExpertsLayout:
        """Reads the layout of a module that `find_experts` returns."""
        module: Any = experts
        first, down = (getattr(module, name).shape for name in ((UP, GATE_UP)[module.has_gate], DOWN))
        axis = -2 if module.is_transposed else -1
        return cls(
            count=down[0],
            hidden=first[axis],
            intermediate=down[axis],
            output=down[-1 if module.is_transposed else -2],
            has_gate=module.has_gate,
            has_bias=module.has_bias,
            is_transposed=module.is_transposed,
            is_interleaved=module.has_gate and gate_is_interleaved(module),
            has_post_norm=has_post_norm(module),
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The parameters' names in the order of computing, each with [out, in]."""
        first = (GATE_UP, 2 * self.intermediate) if self.has_gate else (UP, self.intermediate)
        return {first[0]: (first[1], self.hidden), DOWN: (self.output, self.intermediate)}


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


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that hold a layer's experts by their names in the base, with or without an adapter on it."""
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return {name.replace(".base_layer", ""): module for name, module in base.named_modules() if is_experts(module)}


def use_experts(model: nn.Module) -> None:
    """Makes `run_experts` compute the experts of a model."""
    register_experts(IMPLEMENTATION, run_experts)
    for experts in find_experts(model).values():
        set_experts_implementation(experts, IMPLEMENTATION)


def expert_weight(experts: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """Returns a projection as [experts, out, in] in `dtype`, a view where that is possible."""
    weight: Tensor = getattr(experts, name)
    weight = weight.to(dtype)
    return weight.transpose(1, 2) if ExpertsLayout.of(experts).is_transposed else weight


def run_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Returns what the experts of a layer make of hidden states, [tokens, hidden].

    `top_k_index` names the experts of each token and `top_k_weights` what each counts, both [tokens, k].
    """
    layout = ExpertsLayout.of(experts)
    routing = Routing.sort(top_k_index, layout.count)
    rows = permute(hidden.to(_compute_dtype(experts, hidden)), routing)
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
        weight = expert_weight(experts, name, rows.dtype)
        return grouped_mm(rows, weight.transpose(1, 2), routing.offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        experts, name, routing, dtype = ctx.inputs
        weight = expert_weight(experts, name, dtype)
        return grouped_mm(grad.contiguous(), weight, routing.offsets), None, None, None


def run_adapter(adapter: ExpertAdapter, rows: Tensor, routing: Routing, *, is_training: bool) -> Tensor:
    """Returns what an adapter adds to a projection's outputs."""
    rows = nn.functional.dropout(rows, adapter.dropout, is_training)
    low = grouped_linear(rows, adapter.a.to(rows.dtype), routing.offsets)
    return grouped_linear(low, adapter.b.to(rows.dtype), routing.offsets) * adapter.scaling


def _compute_dtype(experts: nn.Module, hidden: Tensor) -> torch.dtype:
    """Returns the dtype of the matmuls: that of autocast, or of the weights."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    weight: Tensor = getattr(experts, DOWN)
    return weight.dtype
