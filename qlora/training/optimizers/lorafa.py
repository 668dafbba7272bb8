"""LoRA-FA (arXiv 2308.03303): AdamW on gradients of B that stand for those of the whole weight.

With A frozen, the step of B whose product with A is nearest to the gradient of the weight is the gradient of B times
the inverse of A A^T, over the square of what the adapter's output is scaled by. It computes what PEFT's optimizer of
this name does, in float32 and not under bf16 autocast; A stays, so that the inverse is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainingArguments

from qlora.errors import ConfigError
from qlora.training.optimizers.closure import loss_of
from qlora.upstream.torch_models import weight_of

FLOOR = 1e-8
"""Is added to the diagonal of A A^T, as by PEFT."""


def build(args: TrainingArguments, model: nn.Module, given: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """Returns the class of the optimizer and its arguments; raises `ConfigError` where A trains."""
    if not (partners := find_partners(model)):
        raise ConfigError(
            "trainer.optim=lorafa trains B beside an A that is frozen, and this adapter has none; set lora=lora-fa, or "
            "choose another, e.g. trainer.optim=adamw_torch"
        )
    betas = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return LoraFa, {"lr": args.learning_rate, **betas, "partners": partners, **given}


def find_partners(model: nn.Module) -> dict[Tensor, tuple[Tensor, float]]:
    """Returns for each B that trains the A that does not, and what the adapter's output is scaled by."""
    partners: dict[Tensor, tuple[Tensor, float]] = {}
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name in layer.lora_B:
            a, b = weight_of(layer.lora_A[name]), weight_of(layer.lora_B[name])
            if b.requires_grad and not a.requires_grad:
                partners[b] = (a, layer.scaling[name])
    return partners


class LoraFa(torch.optim.AdamW):
    """AdamW, with the gradients of the matrices in `partners` replaced; all other parameters train as by AdamW."""

    def __init__(self, params: Iterable[Any], lr: float, *, partners: Mapping[Tensor, Any], **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.partners = partners
        self._inverses: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self.partners:
                    parameter.grad = (parameter.grad.float() @ self._inverse(parameter)).to(parameter.dtype)
        super().step()
        return loss

    def _inverse(self, parameter: nn.Parameter) -> Tensor:
        """Returns the inverse of A A^T over the square of the scaling, float32 [r, r]."""
        if parameter not in self._inverses:
            a, scaling = self.partners[parameter]
            product = a.float() @ a.float().T
            product += FLOOR * torch.eye(len(product), device=a.device)
            self._inverses[parameter] = torch.linalg.pinv(product, hermitian=True) / scaling**2
        return self._inverses[parameter]
