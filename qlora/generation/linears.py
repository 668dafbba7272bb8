"""The linear layers of a model while it answers: adapters apart, layers of one input together.

Weights of 4 bits are decoded once (`decoded_linears`), or when they are read (`packed_linears`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora.generation.linear_groups import DecodedGroup, PackedGroup, ServedGroup, base_layer_of
from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, can_join, read_quantized_weight
from qlora.step.parts.fused_linear import SAME_INPUT
from qlora.upstream.torch_models import weight_of
from qlora.upstream.transformers_layers import QuantizedLinear


@contextlib.contextmanager
def decoded_linears(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, 4-bit layers and layers with plain adapters compute with weights in `dtype`; adapters stay apart.

    An adapter that is switched off inside is not added; of several, the one that is active is.
    """
    with _grouped(_group(model, dtype, decoded=True)):
        yield


@contextlib.contextmanager
def packed_linears(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """As `decoded_linears`, but 4-bit layers decode their weights whenever they compute, as in training."""
    with _grouped(_group(model, dtype, decoded=False)):
        yield


def decoded_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Returns what `decoded_linears` holds beside the model."""
    layers = {base_layer_of(module) for module in model.modules() if _is_computable(module)}
    states = (getattr(weight_of(layer), "quant_state", None) for layer in layers)
    return sum(state.shape.numel() * dtype.itemsize for state in states if state is not None)


@contextlib.contextmanager
def _grouped(groups: Iterator[ServedGroup]) -> Iterator[None]:
    entered: list[ServedGroup] = []
    try:
        # What parameters are views of must be fit for training again.
        with torch.inference_mode(False), torch.no_grad():
            for group in groups:
                entered.append(group)
                for slot, module in enumerate(group.modules):
                    module.__dict__["forward"] = _forward(group, slot)
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            while entered:  # one at a time is freed as its layers get a memory of their own
                group = entered.pop()
                for module in group.modules:
                    module.__dict__.pop("forward", None)
                group.release()


def _forward(group: ServedGroup, slot: int) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return group.output(slot, x)

    return forward


def _group(model: nn.Module, dtype: torch.dtype, *, decoded: bool) -> Iterator[ServedGroup]:
    adapted = {module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)}
    left = {name: module for name, module in model.named_modules() if _is_computable(module) and module not in adapted}
    while left:
        parent, _, child = next(iter(left)).rpartition(".")
        together = [[f"{parent}.{kind}" for kind in kinds] for kinds in SAME_INPUT if child in kinds]
        names = next((names for names in together if _can_join(names, left, decoded)), [next(iter(left))])
        modules = [left.pop(name) for name in names]
        is_packed = not decoded and all(_packed_of(module) is not None for module in modules)
        yield (PackedGroup if is_packed else DecodedGroup)(modules, dtype)


def _can_join(names: list[str], layers: dict[str, nn.Module], decoded: bool) -> bool:
    """Returns whether layers that read one input can compute as one group."""
    if not all(name in layers for name in names):
        return False
    weights = [_packed_of(layers[name]) for name in names]
    if decoded or all(weight is None for weight in weights):
        return True
    packed = [weight for weight in weights if weight is not None]
    return len(packed) == len(names) and can_join(packed)


def _is_computable(module: nn.Module) -> bool:
    """Returns whether a layer is a 4-bit one or has one plain adapter, so that there is something to gain."""
    layer = base_layer_of(module)
    if not isinstance(layer, nn.Linear) or isinstance(layer, QuantizedLinear):
        return False
    is_packed = read_quantized_weight(weight_of(layer)) is not None
    if not isinstance(module, LoraLayer):
        return is_packed
    if (
        hasattr(module, "lora_E")
        or not module.lora_A
        or module.lora_variant
        or module.merged
        or any(module.lora_bias.values())
    ):
        return False
    return is_packed or weight_of(layer).is_floating_point()


def _packed_of(module: nn.Module) -> QuantizedWeight | None:
    return read_quantized_weight(weight_of(base_layer_of(module)))
