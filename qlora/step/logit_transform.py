"""What an architecture does to its logits beside the matmul with the output matrix: a factor, or a soft cap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from qlora.upstream.transformers_model import decoder_of

SMALL, MIDDLE, LARGE = 1e-3, 64.0, 1e8
"""Logits at which a transform is measured: its factor, its form, and its cap."""


@dataclass(frozen=True)
class LogitTransform:
    """Logits are `scale` times the product with the output matrix, and with `cap` then cap * tanh(logits / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Returns the logits."""
        scaled = product * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


PLAIN = LogitTransform()
"""Logits are the product with the output matrix."""


def find_transform(model: PreTrainedModel) -> LogitTransform | None:
    """Returns what a model does to its logits; None: something else than a `LogitTransform`.

    It is measured, whatever the config calls it: the model's own forward pass gets numbers in the place of the
    decoder's output, and an output layer that returns what it reads.
    """
    output: Any = model.get_output_embeddings()
    middle = torch.linspace(-MIDDLE, MIDDLE, 2 * output.weight.shape[1], device=output.weight.device).view(1, 2, -1)
    with _head_alone(model, output) as head:
        try:
            scale, large, logits = head(torch.full_like(middle, SMALL)) / SMALL, head(middle * LARGE), head(middle)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # its forward pass needs more than that
            return None
    transform = LogitTransform(_round(scale))
    if float(large.abs().max()) < LARGE / 1e3:
        transform = LogitTransform(transform.scale, _round(large.abs()))
    return transform if logits.shape == middle.shape and torch.allclose(transform(middle), logits, 1e-4, 1e-6) else None


def _round(values: Tensor) -> float:
    """Returns the largest of some values, as a config writes it: float32 adds digits."""
    return float(f"{float(values.max()):.6g}")


@contextlib.contextmanager
def _head_alone(model: PreTrainedModel, output: nn.Module) -> Iterator[Any]:
    """Inside, what is yielded returns the logits, float32, for the products of a decoder's output."""
    decoders: list[Any] = [model.base_model, decoder_of(model)]

    def head(products: Tensor) -> Tensor:
        for decoder in decoders:
            decoder.forward = lambda *args, **kwargs: _Outputs(last_hidden_state=products)
        ids = torch.zeros(products.shape[:2], dtype=torch.int64, device=products.device)
        with torch.no_grad(), torch.autocast(products.device.type, enabled=False):
            logits: Tensor = type(model).forward(model, input_ids=ids, use_cache=False).logits
        return logits.float()

    previous = {module: module.__dict__.get("forward") for module in (*decoders, output)}
    try:
        output.forward = lambda hidden: hidden
        yield head
    finally:
        for module, forward in previous.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


class _Outputs(MoeModelOutputWithPast):
    """What a decoder returns; of what an architecture adds, nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return
