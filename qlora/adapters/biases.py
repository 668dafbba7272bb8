"""Trained biases: PEFT changes those of the base in place, so the untuned ones are kept beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel

from qlora.errors import ConfigError
from qlora.upstream.peft import lora_config

REWRITING = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""How the inits begin by which PEFT rewrites the base that an adapter is added to."""


def copy_biases(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Returns the biases of a model that no adapter has changed yet, each with a copy."""
    biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    return [(parameter, parameter.detach().clone()) for parameter in biases]


def keep_biases(model: PeftModel, untuned: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Keeps the biases of the untuned base, which the adapter trains in their place, for `adapter_off`."""
    model.__dict__["untuned_biases"] = untuned


@contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """Makes the untuned base of a model with an adapter in the block, also where the adapter trains biases.

    PEFT alone leaves the trained biases on. A model without an adapter stays as it is. Raises `ConfigError` for an
    adapter that rewrote the base when it was loaded: what it leaves behind is not the base.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    start = lora_config(model).init_lora_weights if isinstance(model.base_model, LoraModel) else True
    if isinstance(start, str) and start.startswith(REWRITING):
        raise ConfigError(
            f"adapter: it begins as a part of its base (init_lora_weights={start}, as checkpoints of such a run have "
            "it), so that the untuned base is not what is left without it; measure that with adapter=none, and leave "
            "it out here with evaluation.baseline=false"
        )
    has_biases = any(config.bias != "none" for config in model.peft_config.values() if hasattr(config, "bias"))
    untuned = model.__dict__["untuned_biases"] if has_biases else []
    trained = [(parameter, parameter.detach().clone()) for parameter, _ in untuned]
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
            stack.enter_context(model.disable_adapter())
        stack.callback(_set_values, trained)
        _set_values(untuned)
        yield


@torch.no_grad()
def _set_values(parameters: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    for parameter, value in parameters:
        parameter.copy_(value)
