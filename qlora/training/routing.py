"""How evenly a mixture spreads tokens over its experts, and the loss that would balance them, as they are logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.models.decoder import ROUTER, read_decoder
from qlora.step.layer_graphs import NOTED

COEFFICIENT = "router_aux_loss_coef"
"""What the configs of architectures with a balancing loss hold."""


def note_experts(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Notes which experts compute which token; one function for all layers, which share their compiled code."""
    if module.training:
        chosen: Tensor = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        module.__dict__[NOTED] = chosen.detach()


class RoutingMeter:
    """Counts the tokens of each expert in training, without waiting for the device.

    What a layer routes is noted, not added, when it computes: a layer that computes again in the backward pass notes
    the same once more. `add` takes the notes of a micro-batch, once its backward pass is over: of experts those of each
    token, of a router the sums of probabilities and the number of tokens.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._experts = list(find_experts(base).values())
        self._sizes = [ExpertsLayout.of(module).count for module in self._experts]
        self._routers: list[nn.Module] = []
        self._base = base
        self._mask: Tensor | None = None
        self._masks: dict[int, Tensor] = {}
        for module in self._experts:
            module.register_forward_pre_hook(note_experts, with_kwargs=True)
        if hasattr(base.config.get_text_config(), COEFFICIENT):
            names = [matrix.name.rpartition(".")[0] for matrix in read_decoder(base).matrices if matrix.kind == ROUTER]
            self._routers = [base.get_submodule(name) for name in names]
            for router in self._routers:
                router.register_forward_hook(self._note_router)
        self._reset()

    def _reset(self) -> None:
        self._counts: Tensor | None = None
        self._balance: tuple[Tensor, Tensor] | None = None

    def begin(self, batch: dict[str, Tensor]) -> None:
        """Prepares for a micro-batch, whose padding does not count."""
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        if mask is not None and (mask.dim() not in (2, 3) or (ids is not None and mask.numel() != ids.numel())):
            mask = None
        shaped = ids if mask is None else mask
        self._mask = None if shaped is None else self._mask_of(shaped.numel())
        if self._mask is not None:
            self._mask.copy_(torch.ones_like(self._mask) if mask is None else mask.reshape(-1) != 0)
        for module in (*self._experts, *self._routers):
            module.__dict__.pop(NOTED, None)

    def _mask_of(self, tokens: int) -> Tensor:
        """Returns the mask of all micro-batches of that size: a CUDA graph reads it where it has read it before."""
        if tokens not in self._masks:
            self._masks[tokens] = torch.empty(tokens, dtype=torch.bool, device=self._base.device)
        return self._masks[tokens]

    @torch.no_grad()
    def _note_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            logits: Tensor = output[0] if isinstance(output, tuple) else output
            probabilities = logits.detach().reshape(-1, logits.shape[-1]).float().softmax(-1)
            mask = self._weights(len(probabilities), probabilities.device)
            module.__dict__[NOTED] = ((probabilities * mask[:, None]).sum(0), mask.sum())

    def _weights(self, tokens: int, device: torch.device) -> Tensor:
        """Returns 1 for each token of the batch, and 0 for padding: float32 [tokens]."""
        if self._mask is None or len(self._mask) != tokens:  # laid out without padding
            return torch.ones(tokens, device=device)
        return self._mask.to(device, torch.float32)

    @torch.no_grad()
    def add(self) -> None:
        """Adds what the layers have noted of a micro-batch."""
        routed = [module.__dict__.get(NOTED) for module in self._experts]
        noted = [(size, chosen) for size, chosen in zip(self._sizes, routed, strict=True) if chosen is not None]
        if not noted:
            return
        device, start, ids, weights = noted[0][1].device, 0, [], []
        for size, chosen in noted:
            ids.append((chosen.to(device) + start).reshape(-1))
            weights.append(self._weights(len(chosen), device).repeat_interleave(chosen.shape[-1]))
            start += size
        counts = torch.zeros(start, device=device)
        counts.index_put_((torch.cat(ids),), torch.cat(weights), accumulate=True)
        self._counts = counts if self._counts is None else self._counts + counts
        probabilities = [module.__dict__[NOTED] for module in self._routers if NOTED in module.__dict__]
        if len({len(sums) for sums, _ in probabilities}) == 1:
            sums = torch.stack([sums.to(device) for sums, _ in probabilities]).sum(0)
            tokens = torch.stack([count.to(device) for _, count in probabilities]).sum()
            balance = (sums, tokens)
            self._balance = balance if self._balance is None else (self._balance[0] + sums, self._balance[1] + tokens)
        self.begin({})

    def since_last_log(self, reduce: Callable[[Tensor], Tensor], steps: int) -> dict[str, float]:
        """Returns the tokens of an expert a step, the share of experts without any, and the balancing loss.

        `reduce` sums over all processes. The loss is that of transformers' models over all tokens since the last call,
        before its coefficient.
        """
        if self._counts is None:
            return {}
        counts, balance = self._counts, self._balance
        parts = [counts] if balance is None else [counts, balance[0], balance[1][None]]
        numbers = reduce(torch.cat(parts)).cpu()
        self._reset()
        counts = numbers[: len(counts)]
        metrics = {
            "expert_tokens_mean": float(counts.mean()) / max(steps, 1),
            "expert_tokens_max": float(counts.max()) / max(steps, 1),
            "expert_idle_share": float((counts == 0).float().mean()),
        }
        if balance is not None:
            size = len(balance[0])
            probabilities, tokens = numbers[len(counts) : -1], numbers[-1]
            of_experts = counts.view(-1, size).sum(0)
            metrics["router_aux_loss"] = float((of_experts * probabilities).sum() / tokens**2) * size
        return metrics


def build_routing_meter(base: PreTrainedModel) -> RoutingMeter | None:
    """Returns the meter of a mixture; None: the model has no experts that tokens are routed to."""
    return RoutingMeter(base) if find_experts(base) else None
