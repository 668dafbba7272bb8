"""The integers of GPTQ and AWQ as the files of a base hold them: they stay packed, and are decoded in each product.

Neither package nor kernel of these is needed. Another base has no such integers: this method reads them, and makes
none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qlora.config.registries.quantization_methods import KEPT
from qlora.config.schema import ComputeDtype, QuantizationConfig
from qlora.errors import ConfigError
from qlora.quantization.layerwise import LayerwiseMethod
from qlora.quantization.stored_base import StoredBase

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qlora.quantization.saved_formats import Codes
    from qlora.runtime.device import Placement

GROUP = 128
"""The weights of a group, by which the plan counts; files may have others."""


class Packed(LayerwiseMethod):
    """Linear layers of `qlora.quantization.packed_layer.PackedLinear`."""

    name = "packed"
    package = "torch"
    library_imports = ("import gptqmodel  # transformers reads the integers of the base by it",)

    def __init__(self) -> None:
        self._read: dict[str, Codes] = {}
        """What was read of a base that is loading, by the names of weights, until a layer takes it."""

    def describe(self, config: QuantizationConfig) -> str:
        """As `packed 4 bit, as the files hold them`."""
        return f"packed {config.bits} bit, as the files hold them"

    def describe_precision(self, config: QuantizationConfig) -> str:
        """As `4-bit integers of its files`."""
        return f"{config.bits}-bit integers of its files"

    def data_type(self, config: QuantizationConfig) -> str:
        """As `int4`."""
        return f"int{config.bits}"

    def stored_base(self, config: QuantizationConfig) -> StoredBase:
        """Counts integers, and for each group a scale in 16 bits and a zero in a byte; a product decodes a matrix."""

        def matrix_bytes(rows: int, columns: int) -> int:
            return rows * columns * config.bits // 8 + 3 * rows * -(-columns // GROUP)

        size = 4 if config.compute_dtype is ComputeDtype.fp32 else 2
        return StoredBase(matrix_bytes, config.bits / 8 + 3 / GROUP, size, decoding_bytes=8)

    def keep_codes(self, name: str, codes: Codes) -> None:
        """Notes the integers of a weight that was read, for the layer of this name."""
        self._read[name.removesuffix(".weight")] = codes

    @contextlib.contextmanager
    def loading(self, config: QuantizationConfig, saved: str | None = None) -> Iterator[None]:
        """Refuses a base without such integers."""
        if saved not in KEPT:
            raise ConfigError(
                f"quantization.method={self.name} keeps the integers of GPTQ and AWQ, and the files of this base hold "
                f"{'16-bit weights' if saved is None else saved}; choose quantization=nf4 or another"
            )
        try:
            yield
        finally:
            self._read.clear()

    def quantize_layer(self, layer: nn.Linear, config: QuantizationConfig, placement: Placement) -> nn.Module:
        """Returns the layer with its integers; one that the files hold in 16 bits stays so."""
        import torch

        from qlora.quantization.packed_layer import PackedLinear

        codes = self._read.pop(vars(layer).get("full_name", ""), None)
        if codes is not None:
            packed = PackedLinear(codes, layer.bias, layer.weight.device)
            if torch.equal(packed.decode(layer.weight.dtype), layer.weight):
                return packed
        layer.__class__ = torch.nn.Linear
        return layer

    def quantized_classes(self) -> tuple[type[nn.Module], ...]:
        """`PackedLinear`."""
        from qlora.quantization.packed_layer import PackedLinear

        return (PackedLinear,)

    def dequantize(self, layer: nn.Module) -> Tensor:
        """In float32."""
        import torch

        quantized: Any = layer
        return quantized.decode(torch.float32)

    def rounding(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """What the files decode to is what the layer computes with."""
        return _same

    def check_saved(self, config: QuantizationConfig, settings: Mapping[str, Any], key: str) -> None:
        """Refuses what is not decoded at all."""
        raise ConfigError(
            f"{key} is quantized by {settings.get('quant_method', 'an unknown method')}, and quantization.method="
            f"{self.name} keeps the integers of GPTQ and AWQ; use the original 16-bit weights, or quantization=stored"
        )


def _same(weight: Tensor) -> Tensor:
    return weight.float()
