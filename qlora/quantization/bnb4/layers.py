"""bitsandbytes' 4-bit linear layers: quantize, dequantize, and what they need to compute as they were trained."""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

from qlora.quantization.method import SavedTensors
from qlora.upstream.bitsandbytes import quant_state, quantize_on
from qlora.upstream.torch_models import weight_of


def quantize(layer: torch.nn.Module, weight: Tensor) -> Params4bit:
    """Returns the parameter of a layer that transformers put in place of a full one."""
    assert isinstance(layer, Linear4bit)
    return quantize_on(Params4bit(weight, requires_grad=False, **layer.weight.__dict__), weight.device)


def dequantize(layer: torch.nn.Module) -> Tensor:
    """Returns a layer's weight [out, in] in the dtype that it decodes to."""
    assert isinstance(layer, Linear4bit)
    return bnb.dequantize_4bit(layer.weight.data, quant_state(layer.weight))


@dataclass(frozen=True)
class Rounding:
    """How bitsandbytes rounds the weight of a layer when it quantizes that."""

    quant_type: str
    double_quant: bool
    blocksize: int

    @classmethod
    def of(cls, layer: torch.nn.Module) -> Rounding:
        """Returns the rounding of a quantized layer."""
        state = quant_state(weight_of(layer))
        return cls(state.quant_type, state.nested, state.blocksize)

    def __call__(self, weight: Tensor) -> Tensor:
        """Returns the weight [out, in] that the layer computes with, to the bit."""
        return bnb.dequantize_4bit(*self.quantize(weight))

    def quantize(self, weight: Tensor) -> tuple[Tensor, bnb.QuantState]:
        """Returns the packed weight [out, in] and how it is decoded."""
        return bnb.quantize_4bit(
            weight.contiguous(),
            blocksize=self.blocksize,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Makes 4-bit layers compute in `dtype`."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype


def set_decoded_dtype(parameter: Tensor, dtype: torch.dtype) -> bool:
    """Makes a 4-bit weight decode to `dtype`; returns False for any other parameter."""
    if not isinstance(parameter, Params4bit):
        return False
    parameter.quant_state.dtype = dtype
    return True


def scales(parameter: Tensor) -> list[Tensor] | None:
    """Returns the absmax values of a 4-bit weight, or what decodes them; None for any other parameter."""
    state = parameter.quant_state if isinstance(parameter, Params4bit) else None
    if state is None:
        return None
    return [state.absmax, *((state.state2.absmax, state.offset) if state.nested else ())]


def missing_statistics(model: torch.nn.Module) -> list[str]:
    """Returns the scales of saved weights that are missing though those they scale are quantized themselves.

    bitsandbytes takes the codes of the latter for scales then (0.50).
    """
    states = {name: getattr(parameter, "quant_state", None) for name, parameter in model.named_parameters()}
    return [
        f"{name}.nested_absmax"
        for name, state in states.items()
        if state is not None and not (state.nested or state.absmax.is_floating_point())
    ]


def read_saved(tensors: SavedTensors, name: str, device: torch.device) -> Tensor | None:
    """Returns a weight [out, in] that is saved in 4 bits in full; None for any other."""
    statistics = {key: tensors.read(key).to(device) for key in tensors.names(f"{name}.")}
    if not statistics:
        return None
    return bnb.dequantize_4bit(tensors.read(name).to(device), bnb.QuantState.from_dict(statistics, device))
