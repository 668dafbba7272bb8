"""4-bit linear layers with their adapters as one operation; layers that read the same input are computed together.

After a step the layers are PEFT's again. Two traces stay: each layer keeps its group in two attributes that nothing
else reads, and the packed weights of a group stay views of one tensor, with the same bytes as before.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, can_join, join, read_quantized_weight
from qlora.step.kernels.dequantize import register, unread
from qlora.step.kernels.dropout import keep_mask
from qlora.step.kernels.fused_linear import GroupedLinear
from qlora.step.part import ConfiguredPart, Request, StepContext
from qlora.upstream.bitsandbytes import quant_state
from qlora.upstream.torch_models import weight_of

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that read the same tensor."""


class FusedLinear(ConfiguredPart):
    """The part that makes 4-bit layers compute in groups."""

    label = "fused_linear"

    def __init__(self, context: StepContext) -> None:
        self.context = context

    def request(self) -> Request:
        """Returns what `trainer.fused_linear` asks for."""
        return Request.of_switch(self.context.trainer, "fused_linear")

    def unsupported_reason(self) -> str | None:
        """Returns why no layer can be fused."""
        if not any(_is_fusible(module) for module in self.context.model.modules()):
            return "the model has no 4-bit layers with plain adapters"
        if self.context.placement.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        return None

    def prepare(self) -> None:
        """Groups the layers."""
        self.context.groups += group_layers(self.context.model)

    def enter(self) -> None:
        """Makes the layers compute in their groups."""
        _set_class(self.context.groups, FastLinear)

    def exit(self, *, failed: bool) -> None:
        """Makes the layers compute by themselves again."""
        _set_class(self.context.groups, Linear4bit)
        if failed:  # a step that failed between q and v has left outputs
            for group in self.context.groups:
                group.pending = None


class LinearGroup:
    """Linear layers that read one input; the first one that is called computes the outputs of all."""

    def __init__(self, members: list[Linear4bit]) -> None:
        self.members, self.layers = members, [member.get_base_layer() for member in members]
        weights = [weight_of(layer) for layer in self.layers]
        self.rows = [quant_state(weight).shape[0] for weight in weights]
        self.codes: QuantizedWeight = join(weights)
        self._is_sharded = isinstance(weights[0], DTensor)
        if not self._is_sharded:
            self.codes = register(self.codes.packed, self.codes)
        self.columns = self.codes.columns
        self._packed, *self._constants = self.codes.tensors()
        self.weight_scale: Tensor | None = None
        """With 8-bit matmuls, the factor with which the weights fill the range of e4m3: float32 [1]."""
        self.scales: Tensor | None = None
        """With 8-bit matmuls, the `scales` of `GroupedLinear`; `AmaxTracker` fills them in."""
        self.pending: tuple[Tensor, list[Tensor]] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The packed bytes of the layers, by which operators find the rest.

        Of sharded layers, all tensors of their `QuantizedWeight`, with the whole weights as they are now.
        """
        if not self._is_sharded:
            return [self._packed]
        return [*(weight_of(layer) for layer in self.layers), *self._constants]

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Declares that nothing in the block reads the outputs; sharded weights must be gathered where it begins."""
        with unread(self.tensors[0]):
            yield

    def output(self, slot: int, x: Tensor) -> Tensor:
        """Returns the output of a member for its input `x` [..., columns]."""
        if self.pending is None or self.pending[0] is not x:
            self.pending = (x, self.compute(x))
        output = self.pending[1][slot]
        if slot == len(self.members) - 1:
            self.pending = None
        return output

    def compute(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of all members, each [..., rows]."""
        first = self.members[0]
        # 8-bit matmuls return bf16, also where a CPU computes everything else in float32.
        dtype = x.dtype if self.weight_scale is None else torch.bfloat16
        flat = x.reshape(-1, self.columns).to(dtype)
        matrices: list[Any] = [member.lora_A["default"].weight for member in self.members]
        a = torch.cat(matrices).to(dtype)
        b = [(member.lora_B["default"].weight * member.scaling["default"]).to(dtype) for member in self.members]
        dropped = _drop(flat, first.lora_dropout["default"])
        results = GroupedLinear.apply(flat, dropped, a, self.scales, self.rows, *b, *self.tensors)
        outputs = []
        for member, part in zip(self.members, results, strict=True):
            bias = member.get_base_layer().bias
            part = part if bias is None else part + bias.to(part.dtype)
            outputs.append(part.view(*x.shape[:-1], -1).to(x.dtype))
        return outputs


class FastLinear(Linear4bit):
    """PEFT's 4-bit linear layer as it computes inside a step: with its group."""

    group: LinearGroup
    slot: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output; in evaluation, PEFT's own."""
        if not self.training:
            return super().forward(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return self.group.output(self.slot, x)


def group_layers(model: torch.nn.Module) -> list[LinearGroup]:
    """Groups the 4-bit layers with plain adapters, and stores its group in each layer."""
    groups: list[LinearGroup] = []
    left = {name: module for name, module in model.named_modules() if _is_fusible(module)}
    while left:
        members = [left.pop(name) for name in _same_input(next(iter(left)), left)]
        group = LinearGroup(members)
        groups.append(group)
        for slot, member in enumerate(members):
            member.group, member.slot = group, slot
    return groups


def _same_input(name: str, layers: dict[str, Linear4bit]) -> list[str]:
    """Returns the names of the layers that can be computed together with the one of `name`, in order."""
    parent, _, child = name.rpartition(".")
    for kinds in SAME_INPUT:
        together = [f"{parent}.{kind}" for kind in kinds]
        if child in kinds and all(name in layers for name in together):
            rates = {getattr(layers[name].lora_dropout["default"], "p", 0.0) for name in together}
            codes = [read_quantized_weight(weight_of(layers[name].get_base_layer())) for name in together]
            if len(rates) == 1 and can_join([weight for weight in codes if weight is not None]):
                return together
    return [name]


def _is_fusible(module: torch.nn.Module) -> bool:
    """Returns whether `FastLinear` can compute a layer: it has 4-bit weights and one plain adapter."""
    if type(module) is not Linear4bit or list(module.lora_A) != ["default"] or module.lora_variant:
        return False
    return (
        not (module.merged or module.lora_bias["default"])
        and read_quantized_weight(weight_of(module.get_base_layer())) is not None
    )


def _set_class(groups: list[LinearGroup], kind: type[Linear4bit]) -> None:
    for group in groups:
        for member in group.members:
            object.__setattr__(member, "__class__", kind)  # not by way of torch's slower `Module.__setattr__`


def _drop(x: Tensor, dropout: torch.nn.Module) -> Tensor | None:
    """Returns `x` after an adapter's dropout; None: it has none, or it is switched off.

    Compiled code drops by a mask that the backward pass computes again.
    """
    rate = getattr(dropout, "p", 0.0)
    if rate == 0 or not dropout.training:
        return None
    if torch.compiler.is_compiling():
        return torch.where(keep_mask(x, rate), x / (1 - rate), 0)
    dropped: Tensor = dropout(x)
    return dropped
