"""The experts of a mixture as two operations on routed rows, with their adapters in the same matmuls.

Between them stands the model's own activation. Layers keep what they compute with in one attribute that nothing else
reads; which function computes them is restored after a step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora.experts.forward import ADAPTERS, compute_dtype
from qlora.experts.layout import DOWN, ExpertsLayout, expert_weight, is_stored, stored_experts
from qlora.experts.ranks import kernel_rank
from qlora.quantization.bnb4.expert_unit import QuantizedUnit
from qlora.quantization.bnb4.experts import QuantizedExperts
from qlora.quantization.bnb4.layout import BLOCK
from qlora.step.kernels.dequantize import unread
from qlora.step.kernels.dropout import keep_mask
from qlora.step.kernels.experts import FIELDS, FrozenExperts, QuantizedProjections, apply_experts, join_projections
from qlora.step.kernels.grouped import Routing, SortWeights, route_tokens
from qlora.step.part import SPREAD, ConfiguredPart, Request, StepContext
from qlora.upstream.peft import ExpertsWrapper
from qlora.upstream.transformers_experts import (
    apply_gate,
    experts_implementation,
    is_experts,
    register_experts,
    set_experts_implementation,
)

IMPLEMENTATION = "qlora_fast"
"""The name of `run_fast_experts` in transformers' `ExpertsInterface`."""


class FusedExperts(ConfiguredPart):
    """The part that makes the experts of a layer compute on rows that are sorted once."""

    label = "fused_experts"

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.modules = [module for module in context.base.modules() if is_experts(module)]
        self._previous: list[str] = []

    def request(self) -> Request | None:
        """Returns what `trainer.fused_experts` asks for; a dense model has none."""
        return Request.of_switch(self.context.trainer, "fused_experts") if self.modules else None

    def unsupported_reason(self) -> str | None:
        """Returns why the experts are computed by the plain forward pass."""
        if self.context.is_spread:
            return SPREAD
        if self.context.placement.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        return next((reason for module in self.modules if (reason := experts_unsupported_reason(module))), None)

    def prepare(self) -> None:
        """Collects the weights of each layer."""
        register_experts(IMPLEMENTATION, run_fast_experts)
        for module in self.modules:
            fast = FastExperts.of(module)
            module.__dict__["fast_experts"] = fast
            self.context.experts.append(fast)

    def enter(self) -> None:
        """Makes the experts compute so."""
        self._previous = [experts_implementation(module) for module in self.modules]
        for module in self.modules:
            set_experts_implementation(module, IMPLEMENTATION)

    def exit(self, *, failed: bool) -> None:
        """Restores what computed the experts."""
        for module, name in zip(self.modules, self._previous, strict=True):
            set_experts_implementation(module, name)


@dataclass
class FastExperts:
    """The frozen weights of a layer's experts."""

    layout: ExpertsLayout
    first: FrozenExperts
    """Gate and up, or up alone."""
    down: FrozenExperts
    adapters: dict[str, ExpertsWrapper]
    """PEFT's adapters by projection; their A and B matrices are read in each step, for an optimizer may move them."""
    dropout: float
    sharded: dict[str, list[QuantizedUnit]] = field(default_factory=dict)
    """What processes share of the weights by projection: it is read when the layer is called."""
    _packed: list[FrozenExperts] = field(default_factory=list)
    """The weights in 4 bits, while they are kept decoded; else nothing."""

    @classmethod
    def of(cls, experts: nn.Module) -> Self:
        """Reads them from a module of transformers."""
        layout, adapters = ExpertsLayout.of(experts), experts.__dict__.get(ADAPTERS)
        first, down = (_read_weights(experts, layout, projection) for projection in layout.projections)
        wrappers = {} if adapters is None else {name: adapters.wrappers[name] for name in adapters}
        return cls(
            layout, first, down, wrappers, 0.0 if adapters is None else adapters.dropout, _find_sharded(experts, layout)
        )

    def tensors(self, projection: str, weights: FrozenExperts) -> list[Tensor]:
        """Returns the tensors of a projection's weights; of sharded ones, the whole weights as they are now."""
        if projection not in self.sharded:
            return weights.tensors
        tensors = [*weights.tensors]
        for index, unit in enumerate(self.sharded[projection]):
            tensors[FIELDS * index] = unit.packed
        return tensors

    def adapter(self, projection: str, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns what the adapter reads (None: `x` itself), and its A and scaled B matrices."""
        if projection not in self.adapters:
            return None, None, None
        read = torch.where(keep_mask(x, self.dropout), x / (1 - self.dropout), 0) if self.dropout else None
        return read, *padded_matrices(self.adapters[projection], "default", x.dtype)

    @property
    def is_packed(self) -> bool:
        """Whether the weights are in 4 bits, kept decoded or not."""
        first = self._packed[0] if self._packed else self.first
        return first.is_quantized

    @property
    def waits(self) -> bool:
        """Whether weights wait in the host's memory."""
        return any(weights.quantized is not None and weights.quantized.waits for weights in (self.first, self.down))

    def scale_weights(self) -> None:
        """Prepares for matmuls in 8 bits; weights in 16 bits stay in them."""
        self.first, self.down = (
            replace(weights, weight_scale=weights.find_scale()) for weights in (self.first, self.down)
        )

    def keep(self, dtype: torch.dtype) -> None:
        """Decodes the weights for all passes until `release`; `dtype` is that of the matmuls in 16 or 32 bits."""
        if not self._packed:
            decoded = [weights.decode(dtype) for weights in (self.first, self.down)]  # which may run out of memory
            self._packed, (self.first, self.down) = [self.first, self.down], decoded

    def release(self) -> None:
        """Frees what `keep` has decoded: each pass decodes the weights again."""
        if self._packed:
            (self.first, self.down), self._packed = self._packed, []

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Declares that nothing in the block reads the outputs of the down projection.

        Sharded weights must be gathered where it begins.
        """
        with unread(self.tensors(DOWN, self.down)[0]):
            yield


def run_fast_experts(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `qlora.experts.forward.run_experts`, of which it is the fast twin."""
    dtype = compute_dtype(experts, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        output = _run(experts, experts.fast_experts, hidden.to(dtype), top_k_index, top_k_weights)
    return output.to(hidden.dtype)


def _run(experts: Any, fast: FastExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    first, down = fast.layout.projections
    routing = route_tokens(top_k_index, fast.layout.count)
    dtype = hidden.dtype
    rows = _compute(fast, first, hidden, routing, gathers=True)
    owners = top_k_index.reshape(-1)[routing.order] if fast.layout.has_bias else None
    if owners is not None:
        rows = rows + getattr(experts, f"{first}_bias").to(dtype)[owners]
    weights = SortWeights.apply(top_k_weights, routing.order, routing.positions)
    rows = (apply_gate(experts, rows) * weights).to(dtype)
    output = _compute(fast, down, rows, routing, gathers=False)
    if owners is not None:
        bias = experts.down_proj_bias.to(dtype)[top_k_index]
        output = output + (bias * top_k_weights[..., None].to(dtype)).sum(1)
    return output


def _compute(fast: FastExperts, projection: str, x: Tensor, routing: Routing, *, gathers: bool) -> Tensor:
    weights = fast.first if gathers else fast.down
    tensors = fast.tensors(projection, weights)
    return apply_experts(x, *fast.adapter(projection, x), routing, weights, tensors, gathers=gathers)


def padded_matrices(wrapper: ExpertsWrapper, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the A and scaled B matrices of an adapter in `dtype`, with a rank of the kernels."""
    a, b, scaling = wrapper.matrices(adapter)
    missing = kernel_rank(a.shape[1]) - a.shape[1]
    a, b = a.to(dtype), (b * scaling).to(dtype)
    if missing:
        a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
    return a, b


def _read_weights(experts: nn.Module, layout: ExpertsLayout, projection: str) -> FrozenExperts:
    shape, quantized = layout.projections[projection], None
    if is_stored(experts, projection):
        store = stored_experts(experts)
        assert isinstance(store, QuantizedExperts)
        units = [store.unit(unit.name) for unit in layout.units_of(projection)]
        weights = [store.weight_of(unit) for unit in units]
        if any(unit.is_sharded for unit in units):
            tensors = join_projections(weights)
        else:
            quantized = QuantizedProjections.register(weights)
            tensors = [weights[0].packed]
    else:
        tensors = [expert_weight(experts, projection, getattr(experts, projection).dtype).detach()]
    return FrozenExperts(tensors, *shape, is_interleaved=layout.is_interleaved, quantized=quantized)


def _find_sharded(experts: nn.Module, layout: ExpertsLayout) -> dict[str, list[QuantizedUnit]]:
    store = stored_experts(experts)
    if not isinstance(store, QuantizedExperts) or not any(unit.is_sharded for unit in store.units):
        return {}
    return {name: [store.unit(unit.name) for unit in layout.units_of(name)] for name in layout.projections}


def experts_unsupported_reason(experts: nn.Module) -> str | None:
    """Returns why the experts of a layer are computed by the plain forward pass."""
    layout, store = ExpertsLayout.of(experts), stored_experts(experts)
    weights = [getattr(experts, projection) for projection in layout.projections]
    if any(weight.requires_grad for weight in weights):
        return "the experts' weights are trained"
    if any(isinstance(weight, DTensor) for weight in weights):
        return "the experts are sharded over processes"
    if layout.has_post_norm:
        return "the experts' outputs are normalised"
    if not isinstance(store, QuantizedExperts | None):
        return f"it has no kernels for experts in {store.data_type}"
    if any(size % BLOCK for size in (layout.hidden, layout.intermediate, layout.output)):
        return f"the widths of the experts are no multiples of {BLOCK}"
    return None
