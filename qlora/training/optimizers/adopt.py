"""ADOPT: Adam whose second moment leaves the newest gradient out, so that it converges with any beta2.

Taniguchi and others, ADOPT: Modified Adam Can Converge with Any Beta2 with the Optimal Rate (arXiv 2411.02853),
algorithm 2: clipped by the fourth root of the step, with decoupled weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from qlora.training.optimizers.closure import loss_of


def build(args: TrainingArguments, model: nn.Module, given: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """Returns the class of the optimizer and its arguments."""
    return Adopt, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": 1e-6, **given}


class Adopt(torch.optim.Optimizer):
    """ADOPT; a first step only takes in the squares of the gradient."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, parameter.grad)
        return loss

    def _update(self, group: dict[str, Any], parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), gradient.square()
            return
        state["step"] += 1
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        limit = float(state["step"]) ** 0.25
        scaled = (gradient / state["exp_avg_sq"].sqrt().clamp(min=group["eps"])).clamp(-limit, limit)
        parameter.add_(state["exp_avg"].lerp_(scaled, 1 - beta1), alpha=-group["lr"])
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
