"""The reference of a preference loss: for the time of a pass, the model with the trained weights as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlora.experts.layout import find_experts


class ReferenceWeights:
    """Values of the trained parameters that the model takes on inside a block, without dropout.

    The tensors change places and nothing is copied, so a pass with the reference costs no memory but for these values.
    Autocast keeps what it has cast by the parameter, whatever that holds: it forgets it where the values change.
    An adapter whose B matrices are 0 adds exactly 0: with these the model is its base.
    """

    def __init__(self, model: torch.nn.Module, values: Sequence[tuple[torch.nn.Parameter, Tensor]]) -> None:
        self.model, self.values = model, values
        self._experts = list(find_experts(model).values())
        """Modules that drop by themselves what an adapter on them reads."""
        self._dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes the model the reference."""
        trained = [parameter.data for parameter, _ in self.values]
        dropping = [module for module in (*self._dropouts, *self._experts) if module.training]
        fast = [module.__dict__["fast_experts"] for module in self._experts if "fast_experts" in module.__dict__]
        rates = [experts.dropout for experts in fast]
        for parameter, value in self.values:
            parameter.data = value
        torch.clear_autocast_cache()
        for module in dropping:
            module.training = False
        for experts in fast:
            experts.dropout = 0.0
        try:
            yield
        finally:
            for (parameter, _), value in zip(self.values, trained, strict=True):
                parameter.data = value
            torch.clear_autocast_cache()
            for module in dropping:
                module.training = True
            for experts, rate in zip(fast, rates, strict=True):
                experts.dropout = rate
