"""4, 3 or 2 bits a weight by HQQ: a scale and a zero for each 64 weights of a row, fitted without data.

Half-Quadratic Quantization (https://mobiusml.github.io/hqq_blog, package hqq); PEFT adds LoRA to its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora.config.schema import ComputeDtype, QuantizationConfig
from qlora.quantization.layerwise import LayerwiseMethod
from qlora.quantization.stored_base import StoredBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qlora.runtime.device import Placement

GROUP = 64
"""Weights that share a scale and a zero."""
PACKED_GROUPS = {4: 2, 3: 10, 2: 4}
"""Groups whose codes share an integer, by bits: 3 bits are packed in 32, the others in 8."""


class Hqq(LayerwiseMethod):
    """Linear layers of `hqq.core.quantize.HQQLinear`."""

    name = "hqq"
    package = "hqq"
    library_imports = ("from hqq.core.quantize import BaseQuantizeConfig, HQQLinear",)

    def describe(self, config: QuantizationConfig) -> str:
        """As `hqq 4 bit in groups of 64`."""
        return f"hqq {config.bits} bit in groups of {GROUP}"

    def describe_precision(self, config: QuantizationConfig) -> str:
        """As `4-bit HQQ in groups of 64`."""
        return f"{config.bits}-bit HQQ in groups of {GROUP}"

    def data_type(self, config: QuantizationConfig) -> str:
        """As `hqq4`."""
        return f"hqq{config.bits}"

    def quantizing_code(self, config: QuantizationConfig, dtype: str) -> list[str]:
        """Puts a layer of HQQ in the place of each linear one."""
        return [
            f"settings = BaseQuantizeConfig(nbits={config.bits}, group_size={GROUP}, axis=1)",
            "for name, layer in list(model.base_model.named_modules()):",
            "    if isinstance(layer, torch.nn.Linear):",
            f"        quantized = HQQLinear(layer, settings, compute_dtype={dtype}, device=layer.weight.device)",
            "        model.base_model.set_submodule(name, quantized)",
        ]

    def takes(self, config: QuantizationConfig, rows: int, columns: int) -> bool:
        """Takes matrices that whole integers hold; codes of 3 bits are padded."""
        together = 1 if config.bits == 3 else PACKED_GROUPS[config.bits]
        return columns % GROUP == 0 and rows * columns % (GROUP * together) == 0

    def stored_base(self, config: QuantizationConfig) -> StoredBase:
        """Counts codes, and two numbers a group; a product decodes whole matrices, and keeps its input."""
        size = 4 if config.compute_dtype is ComputeDtype.fp32 else 2
        return StoredBase(
            partial(self._matrix_bytes, config, size),
            weight_bytes=(32 / 10 if config.bits == 3 else config.bits) / 8 + 2 * size / GROUP,
            unquantized_bytes=size,
            decoding_bytes=2 * size,
            keeps_input=True,
        )

    def _matrix_bytes(self, config: QuantizationConfig, size: int, rows: int, columns: int) -> int:
        if not self.takes(config, rows, columns):
            return rows * columns * size
        groups = rows * columns // GROUP
        packed = math.ceil(groups / PACKED_GROUPS[config.bits]) * GROUP * (4 if config.bits == 3 else 1)
        return packed + 2 * size * groups

    def quantize_layer(self, layer: nn.Linear, config: QuantizationConfig, placement: Placement) -> nn.Module:
        """Quantizes on the weight's device; scales and zeros have the precision of the other parameters."""
        quantized: Any = _quantize(layer.weight.data, config.bits, placement.param_dtype)
        quantized.bias = layer.bias
        weight = quantized.W_q
        weight.scales, weight.quantized = [quantized.meta["scale"], quantized.meta["zero"]], layer.weight.numel()
        weight.data_type = self.data_type(config)
        return quantized

    def quantized_classes(self) -> tuple[type[nn.Module], ...]:
        """`HQQLinear`."""
        from hqq.core.quantize import HQQLinear

        return (HQQLinear,)

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Scales and zeros keep their precision, so that all dtypes decode the same weights but for rounding."""
        for module in model.modules():
            if isinstance(module, self.quantized_classes()):
                _compute_in(module, dtype)

    def dequantize(self, layer: nn.Module) -> Tensor:
        """In the dtype that the layer computes with."""
        quantized: Any = layer
        return quantized.dequantize()

    def rounding(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """Quantizes as the layer was, and decodes in float32."""
        quantized: Any = layer
        return partial(_round, bits=quantized.meta["nbits"], dtype=quantized.meta["scale"].dtype)


def _quantize(weight: Tensor, bits: int, dtype: torch.dtype) -> nn.Module:
    """Returns the layer of a full weight [out, in], without bias."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    return HQQLinear.from_weights(weight, None, settings, compute_dtype=dtype, device=weight.device)


def _round(weight: Tensor, *, bits: int, dtype: torch.dtype) -> Tensor:
    import torch

    layer: Any = _quantize(weight, bits, dtype)
    _compute_in(layer, torch.float32)
    return layer.dequantize()


def _compute_in(layer: Any, dtype: torch.dtype) -> None:
    layer.compute_dtype = layer.meta["compute_dtype"] = dtype
