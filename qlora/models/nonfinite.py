"""Finds weights that are NaN or infinite, and the module of a model that computes such numbers first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.experts.layout import STORE, Placeholder, find_experts, nonfinite_projections
from qlora.models.outputs import on_output, plain_ids
from qlora.quantization.method import QuantizationMethod
from qlora.upstream.torch_models import TorchDispatchMode, tree_leaves


def is_finite(tensor: Tensor) -> bool:
    """Returns whether no number is NaN or infinite; reads the tensor once and needs no memory."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


class QuantizationWatch(TorchDispatchMode):
    """Looks at weights before they are quantized: 4 bits have no NaN, so that one may become any number."""

    def __init__(self, method: QuantizationMethod) -> None:
        super().__init__()
        self._operators = method.quantizing_operators
        self.spoiled: list[Tensor] = []
        """The quantized tensors of weights that were not finite."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, and notes its result if it quantized what was not finite."""
        result = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in self._operators and not is_finite(args[0]):
            self.spoiled.append(result[0])
        return result


def find_nonfinite(model: torch.nn.Module, method: QuantizationMethod, spoiled: Iterable[Tensor] = ()) -> list[str]:
    """Returns the names of the weights that are not finite; `spoiled` are quantized ones known to come from such."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in spoiled}
    names = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Placeholder):
            continue
        is_spoiled = bool(storages) and parameter.untyped_storage().data_ptr() in storages
        if is_spoiled or not all(map(is_finite, method.scales(parameter) or [parameter])):
            names.append(name)
    experts_modules = find_experts(model)
    for name, experts in experts_modules.items():
        names += [f"{name}.{projection}" for projection in nonfinite_projections(experts)]
    in_stores = tuple(f"{name}.{STORE}." for name in experts_modules)
    # A mask may hold infinities.
    return names + [
        name
        for name, buffer in model.named_buffers()
        if not name.startswith(in_stores) and bool(torch.isnan(buffer).any())
    ]


def first_in_forward(model: PreTrainedModel, names: list[str]) -> str:
    """Returns the weight of `names` that a forward pass uses first."""
    order: dict[str, int] = {}
    ids = plain_ids(model)
    called = {module: name for name, module in model.named_modules()}
    with (
        on_output(model, lambda module, _: order.setdefault(called[module], len(order))),
        torch.no_grad(),
        # What such numbers do to a model is of no concern; what ran until then is in order.
        contextlib.suppress(RuntimeError, ValueError, IndexError),
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return min(names, key=lambda name: order.get(name.rpartition(".")[0], len(order)))


class _Found(Exception):
    """Ends a forward pass."""


def first_nonfinite_module(model: PreTrainedModel, forward: Callable[[], Any]) -> str | None:
    """Returns the name of the first module in `forward` whose output is NaN or infinite; None: there is none."""
    called = {module: name.replace(".base_layer", "") for name, module in model.named_modules()}

    def look(module: torch.nn.Module, output: Any) -> None:
        if not all(is_finite(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            raise _Found(called[module])

    try:
        with on_output(model, look):
            forward()
    except _Found as end:
        return str(end)
    return None
