"""Muon: the averaged gradient of a matrix, made orthogonal, is its update; AdamW trains everything else beside it.

Keller Jordan, https://kellerjordan.github.io/posts/muon/. It computes what `torch.optim.Muon` does, and takes matrices
of one shape at once: a 7B model has 448 adapter matrices, a mixture has those of each expert.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import TrainingArguments

from qlora.errors import ConfigError
from qlora.training.optimizers.closure import loss_of
from qlora.training.optimizers.matrices import Matrices, as_matrices, find_matrices, split_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration, as in `torch.optim.Muon`."""
FLOOR = 1e-7
CHUNK = 2**24
"""The most elements of matrices that are made orthogonal at once, unless a single parameter has more."""


def build(args: TrainingArguments, model: nn.Module, given: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """Returns the class of the optimizer and its arguments; raises `ConfigError` where there are no matrices."""
    if not (matrices := find_matrices(model)):
        raise ConfigError(
            "trainer.optim=muon trains matrices, and this adapter has none; choose another, e.g. "
            "trainer.optim=adamw_torch"
        )
    betas = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return Muon, {"lr": args.learning_rate, **betas, "matrices": matrices, **given}


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, and AdamW with `betas` and `eps` for all others, at one learning rate.

    `adjust_lr_fn=match_rms_adamw` scales an update to the size of AdamW's, so that its learning rates hold here too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        matrices: Matrices,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        self.matrices = matrices
        shared = {"lr": lr, "weight_decay": weight_decay, "is_matrix": False, "betas": betas, "eps": eps}
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(split_groups(params, matrices.__contains__, {"is_matrix": True}), {**shared, **muon})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step."""
        loss = loss_of(closure)
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not group["is_matrix"]:
                self._step_adamw(group, trained)
                continue
            for parameters in _chunks(trained, self.matrices):
                self._step_muon(group, parameters)
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Updates parameters that hold matrices of one shape."""
        updates = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
            updates.append(as_matrices(update, self.matrices[parameter]))
        orthogonal = orthogonalize(torch.cat(updates), group["ns_steps"])
        rate = group["lr"] * _scale(group["adjust_lr_fn"], *orthogonal.shape[1:])
        for parameter, update in zip(parameters, orthogonal.split([len(item) for item in updates]), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.reshape(parameter.shape), alpha=-rate)

    def _step_adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,  # type: ignore[arg-type]
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Returns matrices [n, rows, columns] with singular values near 1, bf16, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=FLOOR)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _scale(rule: str, rows: int, columns: int) -> float:
    """Returns what the learning rate is multiplied by for matrices of a shape, as `torch.optim.Muon` does."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _chunks(parameters: list[nn.Parameter], matrices: Matrices) -> Iterator[list[nn.Parameter]]:
    """Yields parameters whose matrices are of one shape, dtype and device, as many as are taken at once."""
    alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        shape = as_matrices(parameter, matrices[parameter]).shape[1:]
        alike[shape, parameter.dtype, parameter.device].append(parameter)
    for members in alike.values():
        count = max(CHUNK // max(parameter.numel() for parameter in members), 1)
        for start in range(0, len(members), count):
            yield members[start : start + count]
