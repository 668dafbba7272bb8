"""Mixtures of experts in transformers: how a model's experts are found, and what computes them.

transformers keeps the experts of a layer as 3-D parameters of one module, whose class `use_experts_implementation` has
decorated; the function that computes it is looked up by a name in the config. Neither is documented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

LAYOUT = ("has_gate", "has_bias", "is_transposed")
"""What the decorator notes on each module; `is_concatenated` and `has_post_expert_norm` came later."""

ExpertsForward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""From a module, hidden states [tokens, hidden], the experts of each token and their weights [tokens, k]."""


def is_experts(module: nn.Module) -> bool:
    """Returns whether a module holds the experts of a layer and computes them through `ExpertsInterface`."""
    return all(name in module.__dict__ for name in LAYOUT) and hasattr(module, "config")


def gate_is_interleaved(experts: nn.Module) -> bool:
    """Returns whether the rows of gate and up alternate: only gpt-oss has them so."""
    return not getattr(experts, "is_concatenated", not type(experts).__name__.startswith("GptOss"))


def has_post_norm(experts: nn.Module) -> bool:
    """Returns whether each expert's output is normalised."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def apply_gate(experts: Any, rows: Tensor) -> Tensor:
    """Returns what the down projection reads, from what the first projection returned."""
    output: Tensor = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    return output


def register_experts(name: str, forward: ExpertsForward) -> None:
    """Makes `forward` known under a name that a model's config may hold."""
    ExpertsInterface.register(name, forward)


def experts_implementation(experts: Any) -> str:
    """Returns the name of the function that computes a module."""
    name: str = experts.config._experts_implementation
    return name


def set_experts_implementation(experts: Any, name: str) -> None:
    """Makes the function of that name compute a module and those that share its config."""
    experts.config._experts_implementation = name
