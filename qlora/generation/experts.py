"""The experts of a mixture while a model answers: the kernels of training, which do not wait for the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora.experts.layout import ExpertsLayout, is_stored
from qlora.step.parts.experts import (
    IMPLEMENTATION,
    FastExperts,
    experts_unsupported_reason,
    padded_matrices,
    run_fast_experts,
)
from qlora.upstream.transformers_experts import (
    experts_implementation,
    is_experts,
    register_experts,
    set_experts_implementation,
)

HELD = "fast_experts"
"""The attribute of an experts module that `run_fast_experts` reads."""


@dataclass
class ServedExperts(FastExperts):
    """The experts of a layer with the adapter that is on, each cast once."""

    matrices: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By projection and adapter, the A and scaled B matrices."""

    def cast(self, dtype: torch.dtype) -> None:
        """Notes the matrices of all adapters in `dtype`."""
        for projection, wrapper in self.adapters.items():
            for name in wrapper.lora_A:
                a, b = padded_matrices(wrapper, name, dtype)
                self.matrices[projection, name] = a.detach(), b.detach()

    def adapter(self, projection: str, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns None, for the adapter reads `x` itself, and its A and scaled B matrices."""
        name = self.adapters[projection].active if projection in self.adapters else None
        return (None, None, None) if name is None else (None, *self.matrices[projection, name])


@contextlib.contextmanager
def served_experts(model: nn.Module, dtype: torch.dtype, *, decoded: bool) -> Iterator[None]:
    """Inside, experts compute by kernels; with `decoded` their 4-bit weights are decoded once, to `dtype`.

    A layer whose experts the kernels do not serve is computed by the plain forward pass.
    """
    modules = [module for module in model.modules() if is_experts(module)]
    if any(experts_unsupported_reason(module) for module in modules):  # they share what says how they compute
        modules = []
    previous = [(module, module.__dict__.get(HELD), experts_implementation(module)) for module in modules]
    register_experts(IMPLEMENTATION, run_fast_experts)
    try:
        for module in modules:
            with torch.inference_mode(False), torch.no_grad():
                served = ServedExperts.of(module)
                served.cast(dtype)
                if decoded:
                    served.keep(dtype)
            module.__dict__[HELD] = served
            set_experts_implementation(module, IMPLEMENTATION)
        yield
    finally:
        for module, held, implementation in previous:
            module.__dict__.pop(HELD, None)
            if held is not None:
                module.__dict__[HELD] = held
            set_experts_implementation(module, implementation)


def decoded_expert_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Returns what `served_experts` holds of decoded weights beside the model."""
    total = 0
    for module in model.modules():
        if is_experts(module) and experts_unsupported_reason(module) is None:
            layout = ExpertsLayout.of(module)
            sizes = (rows * columns for name, (rows, columns) in layout.projections.items() if is_stored(module, name))
            total += layout.count * sum(sizes) * dtype.itemsize
    return total
