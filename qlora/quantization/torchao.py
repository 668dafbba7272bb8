"""8 bits a weight by torchao: integers with a scale for each row; activations stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qlora.config.schema import ComputeDtype, QuantizationConfig
from qlora.quantization.layerwise import LayerwiseMethod
from qlora.quantization.stored_base import StoredBase

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qlora.runtime.device import Placement


class Torchao(LayerwiseMethod):
    """Linear layers whose weight is torchao's `Int8Tensor`; PEFT refuses its 4-bit tensors."""

    name = "torchao"
    package = "torchao"
    library_class = "TorchAoConfig"
    library_imports = ("from torchao.quantization import Int8WeightOnlyConfig",)

    def describe(self, config: QuantizationConfig) -> str:
        """As `torchao 8 bit`."""
        return "torchao 8 bit"

    def describe_precision(self, config: QuantizationConfig) -> str:
        """As `8-bit torchao integers`."""
        return "8-bit torchao integers"

    def data_type(self, config: QuantizationConfig) -> str:
        """As `torchao-int8`."""
        return "torchao-int8"

    def library_arguments(self, config: QuantizationConfig, dtype: str) -> list[str]:
        """Those of `TorchAoConfig`."""
        return ["quant_type=Int8WeightOnlyConfig()"]

    def stored_base(self, config: QuantizationConfig) -> StoredBase:
        """Counts a byte a weight, and a float32 and a byte a row; a product keeps its input."""
        size = 4 if config.compute_dtype is ComputeDtype.fp32 else 2
        return StoredBase(lambda rows, columns: rows * columns + 5 * rows, 1.0, size, keeps_input=True)

    def peft_attributes(self) -> dict[str, Any]:
        """What PEFT would quantize a merged layer by."""
        from torchao.quantization import Int8WeightOnlyConfig

        return {"get_apply_tensor_subclass": Int8WeightOnlyConfig}

    def quantize_layer(self, layer: nn.Linear, config: QuantizationConfig, placement: Placement) -> nn.Module:
        """Puts the quantized weight in the place of the full one."""
        return _quantize(layer)

    def quantized_classes(self) -> tuple[type[nn.Module], ...]:
        """Those that wait for their weight keep their class."""
        return ()

    def dequantize(self, layer: nn.Module) -> Tensor:
        """In float32."""
        return _decode(layer.weight)

    def rounding(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """Rounds each row."""
        return _round

    def scales(self, parameter: Tensor) -> list[Tensor] | None:
        """The scale of each row, and its zero, which is none."""
        scale, zero = getattr(parameter, "scale", None), getattr(parameter, "zero_point", None)
        return None if scale is None else [scale, *([] if zero is None else [zero])]

    def count(self, parameter: Tensor) -> tuple[int, str]:
        """Counts a weight for each integer."""
        return (parameter.numel(), "torchao-int8") if hasattr(parameter, "qdata") else super().count(parameter)


def _quantize(layer: nn.Linear) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())
    layer.weight.requires_grad_(False)
    return layer


def _round(weight: Tensor) -> Tensor:
    from torch import nn

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return _decode(_quantize(layer).weight)


def _decode(weight: Any) -> Tensor:
    """Returns a weight in float32, whose own `dequantize` rounds to the dtype of the full one."""
    codes: Tensor = weight.qdata.float()
    return (codes if weight.zero_point is None else codes - weight.zero_point) * weight.scale.float()
