"""A pass with the reference computes with its weights, and leaves nothing behind."""

from __future__ import annotations

import torch

from qlora.step.reference import ReferenceWeights


def test_autocast_forgets_the_weights_that_change_places() -> None:
    """Autocast keeps the bfloat16 copy of a parameter by its name, not by its values."""
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.ones_(layer.weight)
    reference = ReferenceWeights(layer, [(layer.weight, torch.zeros(4, 4))])
    ones = torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        previous = layer(ones)
        with torch.no_grad(), reference.active():
            inside = layer(ones)
        after = layer(ones)
    assert (previous.tolist(), inside.tolist(), after.tolist()) == ([[4.0] * 4], [[0.0] * 4], [[4.0] * 4])
    after.sum().backward()
    assert layer.weight.grad is not None
