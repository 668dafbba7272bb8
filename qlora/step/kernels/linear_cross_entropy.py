"""Cross entropy of a linear layer's outputs, computed in pieces so that all logits never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

IGNORED = -100
ROWS = 2048
"""Tokens whose logits exist at a time."""


def entropy_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the summed cross entropy, float32 [], and its gradient with respect to `logits` [tokens, vocabulary].

    `targets` int64 [tokens] may be -100: such a token counts for nothing.
    """
    wide = logits.float()
    highest = wide.amax(1, keepdim=True)
    exponents = (wide - highest).exp()
    total = exponents.sum(1, keepdim=True)
    counted = (targets != IGNORED)[:, None]
    target = targets.clamp(min=0)[:, None]
    chosen = wide.gather(1, target)
    loss = torch.where(counted, total.log() + highest - chosen, 0.0).sum()
    hit = torch.arange(logits.shape[1], device=logits.device)[None, :] == target
    gradient = torch.where(counted, exponents / total - hit.to(wide.dtype), 0.0)
    return loss, gradient.to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """The summed cross entropy of `hidden @ weight.t()`; the gradient is computed with it, piece by piece."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, pieces):
        """Returns float32 [] for `hidden` [tokens, width], a frozen `weight` [vocabulary, width], `targets` [tokens].

        `pieces` is `entropy_and_gradient`, maybe compiled.
        """
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), ROWS):
            part = slice(start, start + ROWS)
            piece, found = pieces(hidden[part] @ weight.t(), targets[part])
            loss += piece
            torch.mm(found, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradient with respect to `hidden`; the weight is frozen."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, pieces: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Returns the summed cross entropy of `hidden @ weight.t()` against `targets`, float32 []."""
    return LinearCrossEntropy.apply(hidden, weight, targets, pieces)
