"""bitsandbytes' 8-bit linear layers: quantize, dequantize, and products that leave them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor

from qlora.errors import ConfigError
from qlora.quantization.method import SavedTensors
from qlora.upstream.accelerate_models import forward_attribute


def quantize(weight: Tensor) -> Int8Params:
    """Returns the parameter of a layer whose full weight is given."""
    packed, scales, _ = bnb.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    return Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)


def dequantize(layer: torch.nn.Module) -> Tensor:
    """Returns a layer's weight, float32 [out, in]."""
    assert isinstance(layer, Linear8bitLt)
    weight = layer.weight
    assert isinstance(weight, Int8Params)
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    assert scales is not None, "the layer is quantized"
    return bnb.int8_vectorwise_dequant(weight.data, scales)


def round_weight(weight: Tensor) -> Tensor:
    """Returns the weight [out, in] that a quantized layer computes with, to the bit."""
    packed, scales, _ = bnb.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    return bnb.int8_vectorwise_dequant(packed, scales)


@contextmanager
def exact_products(model: torch.nn.Module, key: str) -> Iterator[None]:
    """Lets 8-bit layers compute with decoded weights in the block: the first call of their own moves the weight.

    Raises `ConfigError` for a layer that reads more than [rows, tokens, features], which bitsandbytes cannot multiply
    (0.50).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}
    unsupported: list[str] = []

    def compute(name: str, layer: Linear8bitLt, x: Tensor) -> Tensor:
        if x.dim() > 3:
            unsupported.append(name)
        weight = dequantize(layer).to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))

    with ExitStack() as stack:
        for name, layer in layers.items():
            method = forward_attribute(layer)
            previous = {method: layer.__dict__[method]} if method in layer.__dict__ else {}
            stack.callback(layer.__dict__.update, previous)
            stack.callback(layer.__dict__.pop, method)
            layer.__dict__[method] = partial(compute, name, layer)
        yield
    if unsupported:
        raise ConfigError(
            f"quantization.bits=8: {key}: {unsupported[0]} reads more than rows of tokens, which bitsandbytes cannot "
            "multiply by 8-bit weights; use quantization=nf4 or quantization=none"
        )


def read_saved(tensors: SavedTensors, name: str, device: torch.device) -> Tensor | None:
    """Returns a weight [out, in] that is saved in 8 bits in full; None for any other."""
    scales = f"{name.removesuffix('weight')}SCB"
    if scales not in tensors:
        return None
    return bnb.int8_vectorwise_dequant(tensors.read(name).to(device), tensors.read(scales).to(device))
