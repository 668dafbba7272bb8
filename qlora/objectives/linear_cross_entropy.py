"""Cross entropy of a linear layer's outputs, in chunks: the logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora.objectives.protocol import CHUNK, IGNORED


def entropy_and_gradient(
    products: Tensor, targets: Tensor, smoothing: float = 0.0, scale: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the summed cross entropy, float32 [], and its gradient with respect to `products` [tokens, vocabulary].

    The arguments are those of `entropies_and_gradient`.
    """
    losses, gradient = entropies_and_gradient(products, targets, smoothing, scale, cap)
    assert gradient is not None
    return losses.sum(), gradient


def entropies_and_gradient(
    products: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    scale: float = 1.0,
    cap: float | None = None,
    *,
    graded: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Returns the cross entropy of each token, float32 [tokens], and (`graded`) its gradient by the token's products.

    `products` is [tokens, vocabulary], `targets` int64 [tokens]; a token with the target -100 has no loss. `smoothing`
    is the share of a label's probability that is spread evenly over the vocabulary. Logits are `scale` times the
    products with the output matrix, and with `cap` then cap * tanh(logits / cap).
    """
    fp32 = products.float()
    if scale != 1:
        fp32 = fp32 * scale
    if cap is not None:
        fp32 = cap * torch.tanh(fp32 / cap)
    highest = fp32.amax(1, keepdim=True)
    exponents = (fp32 - highest).exp()
    total = exponents.sum(1, keepdim=True)
    counted = (targets != IGNORED)[:, None]
    target = targets.clamp(min=0)[:, None]
    chosen = fp32.gather(1, target)
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * fp32.mean(1, keepdim=True)
    losses = torch.where(counted, total.log() + highest - chosen, 0.0)[:, 0]
    if not graded:
        return losses, None
    expected = (torch.arange(products.shape[1], device=products.device)[None, :] == target).to(fp32.dtype)
    if smoothing:
        expected = (1 - smoothing) * expected + smoothing / products.shape[1]
    gradient = torch.where(counted, exponents / total - expected, 0.0)
    if scale != 1:
        gradient = gradient * scale
    if cap is not None:
        gradient = gradient * (1 - (fp32 / cap).square())
    return losses, gradient.to(products.dtype)


ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns the summed loss of a chunk, float32 [], and its gradient, for the products with the output matrix [tokens,
vocabulary] and targets."""


class LinearCrossEntropy(torch.autograd.Function):
    """The summed loss of `hidden @ weight.t()`; the gradient is computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_loss):
        """Returns float32 [] for `hidden` [tokens, width], a frozen `weight` [vocabulary, width] and `targets`."""
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            amount, of_logits = chunk_loss(hidden[chunk] @ weight.t(), targets[chunk])
            loss += amount
            torch.mm(of_logits, weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradient with respect to `hidden`; the weight is frozen."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


class LinearEntropies(torch.autograd.Function):
    """The loss of each token of `hidden @ weight.t()`; the gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_losses):
        """Returns float32 [tokens] for `hidden` [tokens, width], a frozen `weight` [vocabulary, width], `targets`."""
        losses = torch.empty(len(hidden), device=hidden.device, dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = hidden[chunk] @ weight.t()
            losses[chunk], of_logits = chunk_losses(logits, targets[chunk], graded=gradient is not None)
            if gradient is not None:
                torch.mm(of_logits, weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradient with respect to `hidden`: that of each token's loss, as often as `grad` says."""
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None, None


def linear_entropies(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_losses: Callable[..., Any]) -> Tensor:
    """Returns the loss of each token of `hidden @ weight.t()` against `targets`, float32 [tokens].

    `chunk_losses` is `entropies_and_gradient`, compiled or not. With the losses of single tokens, any loss of their
    sums has its exact gradient, and the logits of all tokens never exist at once.
    """
    return LinearEntropies.apply(hidden, weight, targets, chunk_losses)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_loss: ChunkLoss) -> Tensor:
    """Returns the summed loss of `hidden @ weight.t()` against `targets`, float32 [].

    `chunk_loss` is `entropy_and_gradient`, compiled or not, or another loss of the same form.
    """
    return LinearCrossEntropy.apply(hidden, weight, targets, chunk_loss)
