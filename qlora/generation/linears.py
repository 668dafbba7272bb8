"""The linear layers of a model while it answers: weights decoded once, adapters apart, layers of one input together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from qlora.quantization.bnb4.quantized_weight import decode_plain, read_quantized_weight
from qlora.step.parts.fused_linear import SAME_INPUT
from qlora.upstream.torch_models import weight_of


class _Group:
    """Layers that read one input; the first one that is called computes the outputs of all."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype) -> None:
        layers = [_base_of(module) for module in modules]
        weights = [_decode(layer, dtype) for layer in layers]
        self.rows, self.dtype = [len(weight) for weight in weights], dtype
        self.total = sum(self.rows)
        self.adapters = [module for module in modules if isinstance(module, LoraLayer)]
        # One matmul for the weights and all A matrices, one for all B matrices of an adapter, whose blocks meet their
        # own A alone.
        parts, end = [*weights], self.total
        self.b: dict[str, tuple[slice, Tensor]] = {}
        for name in dict.fromkeys(name for module in self.adapters for name in module.lora_A):
            matrices = [_matrices(module, weight, name) for module, weight in zip(modules, weights, strict=True)]
            parts += [a for a, _ in matrices]
            begin, end = end, end + sum(len(a) for a, _ in matrices)
            self.b[name] = slice(begin, end), torch.block_diag(*(b for _, b in matrices))
        self.weight = torch.cat(parts)
        self.bias = _join_biases(layers, self.rows, self.weight)
        self.pending: tuple[Tensor, list[Tensor]] | None = None

    def output(self, slot: int, x: Tensor) -> Tensor:
        """Returns the output of a member for its input `x` [..., columns]."""
        if len(self.rows) == 1:
            return self.compute(x)[0]
        if self.pending is None or self.pending[0] is not x:
            self.pending = (x, self.compute(x))
        output = self.pending[1][slot]
        if slot == len(self.rows) - 1:
            self.pending = None
        return output

    def compute(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of all members, each [..., rows]."""
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        if (adapter := self._active) is None:
            joint = linear(x, self.weight[: self.total])
        else:
            columns, b = self.b[adapter]
            joint = linear(x, self.weight)
            joint = joint[..., : self.total] + linear(joint[..., columns], b)
        if self.bias is not None:
            joint = joint + self.bias
        return [joint] if len(self.rows) == 1 else list(joint.split(self.rows, dim=-1))

    @property
    def _active(self) -> str | None:
        """The adapter that takes part; None: the bare weights compute."""
        if not self.adapters or self.adapters[0].disable_adapters:
            return None
        return next((name for name in self.adapters[0].active_adapters if name in self.b), None)


@contextlib.contextmanager
def decoded_linears(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, 4-bit layers and layers with plain adapters compute with weights in `dtype`; adapters stay apart.

    An adapter that is switched off inside is not added; of several, the one that is active is.
    """
    groups = _group(model, dtype)
    try:
        for modules, group in groups:
            for slot, module in enumerate(modules):
                module.__dict__["forward"] = _forward(group, slot)
        yield
    finally:
        for modules, _ in groups:
            for module in modules:
                module.__dict__.pop("forward", None)


def decoded_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Returns what `decoded_linears` holds beside the model."""
    layers = {_base_of(module) for module in model.modules() if _is_computable(module)}
    states = (getattr(weight_of(layer), "quant_state", None) for layer in layers)
    return sum(state.shape.numel() * dtype.itemsize for state in states if state is not None)


def _forward(group: _Group, slot: int) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return group.output(slot, x)

    return forward


def _group(model: nn.Module, dtype: torch.dtype) -> list[tuple[list[nn.Module], _Group]]:
    adapted = {module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)}
    left = {name: module for name, module in model.named_modules() if _is_computable(module) and module not in adapted}
    groups = []
    while left:
        parent, _, child = next(iter(left)).rpartition(".")
        together = [[f"{parent}.{kind}" for kind in kinds] for kinds in SAME_INPUT if child in kinds]
        names = next((names for names in together if all(name in left for name in names)), [next(iter(left))])
        modules = [left.pop(name) for name in names]
        groups.append((modules, _Group(modules, dtype)))
    return groups


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _is_computable(module: nn.Module) -> bool:
    """Returns whether a layer is a 4-bit one or has one plain adapter, so that there is something to gain."""
    layer = _base_of(module)
    if not isinstance(layer, nn.Linear):
        return False
    is_packed = read_quantized_weight(weight_of(layer)) is not None
    if not isinstance(module, LoraLayer):
        return is_packed
    if not module.lora_A or module.lora_variant or module.merged or any(module.lora_bias.values()):
        return False
    return is_packed or weight_of(layer).is_floating_point()


def _decode(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    weight = weight_of(layer)
    packed = read_quantized_weight(weight)
    if packed is None:
        return weight.detach().to(dtype)
    decoded = decode_plain(packed, dtype)
    return decoded.view(packed.rows, packed.columns)


def _matrices(module: nn.Module, weight: Tensor, adapter: str) -> tuple[Tensor, Tensor]:
    """Returns the A and the scaled B matrix of a layer's adapter; of a layer without it, those of rank 0."""
    if not (isinstance(module, LoraLayer) and adapter in module.lora_A):
        return weight[:0], weight.new_empty(len(weight), 0)
    a, b = weight_of(module.lora_A[adapter]), weight_of(module.lora_B[adapter])
    return a.detach().to(weight.dtype), (b.detach() * module.scaling[adapter]).to(weight.dtype)


def _join_biases(layers: list[nn.Module], rows: list[int], like: Tensor) -> Tensor | None:
    biases = [getattr(layer, "bias", None) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    parts = [like.new_zeros(count) if bias is None else bias.detach().to(like.dtype)
             for bias, count in zip(biases, rows, strict=True)]  # fmt: skip
    return torch.cat(parts)
