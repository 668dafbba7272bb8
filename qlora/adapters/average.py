"""The mean of several states of what was trained.

A LoRA adapter adds B A to a weight, and the mean of A times the mean of B is not the mean of B A. The mean of k
products is one product of rank k r: all A one below the other, and all B side by side, divided by k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qlora.upstream.peft import ExpertB, ExpertsWrapper, lora_config

ADAPTER = "default"
"""The name of the adapter that is trained."""


@torch.no_grad()
def average_trained(model: torch.nn.Module, states: Iterator[dict[str, Tensor]], count: int) -> None:
    """Gives a model the mean of `count` states of its trained parameters; each holds them by name."""
    if isinstance(model, PeftModel):
        _average_adapters(model, list(states))
    else:
        _average_weights(model, states, count)


def _average_adapters(model: PeftModel, states: Sequence[dict[str, Tensor]]) -> None:
    """Makes the adapter of a model compute the mean of `states` exactly, with k times the rank.

    Trained biases and rows of new tokens become their mean.
    """
    count = len(states)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            parameter.copy_(_mean(state[name] for state in states))
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            experts = (module.num_experts,) if isinstance(module, ExpertsWrapper) else ()
            a = torch.cat([_stacked(state[f"{name}.lora_A.{ADAPTER}.weight"], experts) for state in states], dim=-2)
            b = torch.cat([state[f"{name}.lora_B.{ADAPTER}.weight"].float() / count for state in states], dim=-1)
            _widen(module, a, b)
    config: Any = lora_config(model)
    config.r *= count
    config.lora_alpha = _scaled(config.lora_alpha, count, root=config.use_rslora)
    config.rank_pattern = {name: rank * count for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {
        name: _scaled(alpha, count, root=config.use_rslora) for name, alpha in (config.alpha_pattern or {}).items()
    }


def _average_weights(model: torch.nn.Module, states: Iterable[dict[str, Tensor]], count: int) -> None:
    """Makes the trained parameters of a model their mean; one state is in memory at a time."""
    sums: dict[str, Tensor] = {}
    for state in states:
        for name, tensor in state.items():
            sums[name] = sums.get(name, torch.zeros(())) + tensor.float() / count
    for name, parameter in model.named_parameters():
        if name in sums:
            parameter.copy_(sums[name])


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.float() for tensor in tensors]).mean(0)


def _stacked(a: Tensor, experts: tuple[int, ...]) -> Tensor:
    """Returns A in float32, that of experts as [experts, r, in]."""
    return a.float().view(*experts, -1, a.shape[-1])


def _widen(module: Any, a: Tensor, b: Tensor) -> None:
    """Gives an adapted layer other matrices; what its output is scaled by stays."""
    factor = a.shape[-2] // module.r[ADAPTER]
    device = module.lora_A[ADAPTER].weight.device
    module.lora_A[ADAPTER] = _linear(a.flatten(0, -2), device)
    module.lora_B[ADAPTER] = ExpertB(b.to(device)) if isinstance(module, ExpertsWrapper) else _linear(b, device)
    module.lora_alpha[ADAPTER] = _scaled(module.lora_alpha[ADAPTER], factor, root=module.use_rslora.get(ADAPTER, False))
    module.r[ADAPTER] *= factor


def _linear(weight: Tensor, device: torch.device) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device)
    linear.weight.copy_(weight)
    return linear


def _scaled(alpha: float, count: int, *, root: bool) -> float:
    """Returns the alpha by which an adapter of `count` times the rank is scaled as it was."""
    return alpha * (math.sqrt(count) if root else count)
