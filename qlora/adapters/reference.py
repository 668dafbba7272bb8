"""What a preference loss compares with: the values of the trained weights that make the model its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from qlora.adapters.biases import adapter_off
from qlora.errors import ConfigError
from qlora.step.reference import ReferenceWeights


def reference_at_start(model: PeftModel, *, is_base: bool) -> ReferenceWeights:
    """Returns the reference of a model that is not trained yet: as it is, or the base without the adapter.

    Raises `ConfigError` for an adapter of which nothing is the base (`loss.reference=base`).
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    products = [parameter for name, parameter in trained if ".lora_B." in name]
    is_plain = all(".lora_A." in name or ".lora_B." in name for name, _ in trained)
    if is_plain and (is_base or not any(bool(parameter.any()) for parameter in products)):
        return ReferenceWeights(model, [(parameter, _zeros(parameter)) for parameter in products])
    if is_base:
        others = next(name for name, _ in trained if ".lora_A." not in name and ".lora_B." not in name)
        raise ConfigError(
            f"loss.reference=base: the adapter trains more than LoRA's A and B ({others}), so that the base is not the "
            "model without them; set loss.reference=start, or train such weights no further"
        )
    return ReferenceWeights(model, [(parameter, parameter.detach().clone()) for _, parameter in trained])


def _zeros(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns zeros of the shape of a matrix, which take no memory; those of experts are read as they lie in memory."""
    value = parameter.detach()
    return torch.zeros_like(value) if value.dim() > 2 else value.new_zeros(()).expand(value.shape)


def reference_of_trained(model: PeftModel, start: Path | None) -> Callable[[], AbstractContextManager[None]]:
    """Returns the context in which a loaded model is its reference: the adapter `start`, or the base without one.

    Where the adapter is switched off already, the model is the base in either case.
    """
    if start is None:
        return partial(_base, model)
    adapter = [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name]
    saved = [parameter.detach().clone() for _, parameter in adapter]
    set_peft_model_state_dict(model, load_peft_weights(str(start), device="cpu"))
    values = [(parameter, parameter.detach().clone()) for _, parameter in adapter]
    with torch.no_grad():
        for (_, parameter), value in zip(adapter, saved, strict=True):
            parameter.copy_(value)
    return ReferenceWeights(model, values).active


@contextmanager
def _base(model: PeftModel) -> Iterator[None]:
    if any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in model.modules()):
        yield
        return
    with adapter_off(model):
        yield
