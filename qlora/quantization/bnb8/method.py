"""8 bits a weight by bitsandbytes, with large activations in 16 bits (LLM.int8(), arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from qlora.config.schema import ComputeDtype, LoraConfig, QuantizationConfig
from qlora.errors import ConfigError
from qlora.quantization.method import QuantizationMethod, SavedTensors
from qlora.quantization.rules import check_frozen, check_saved_bits, loftq_needs_4_bits
from qlora.quantization.stored_base import StoredBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora.runtime.device import Placement


class Bnb8(QuantizationMethod):
    """Linear layers of bitsandbytes' `Linear8bitLt`."""

    name = "bnb8"
    package = "bitsandbytes"
    rounds_activations = True
    library_class = "BitsAndBytesConfig"
    quantizing_operators = ("bitsandbytes::int8_vectorwise_quant",)

    def describe(self, config: QuantizationConfig) -> str:
        """As `8 bit`."""
        return "8 bit"

    def describe_precision(self, config: QuantizationConfig) -> str:
        """As `8 bits`."""
        return "8 bits"

    def data_type(self, config: QuantizationConfig) -> str:
        """As `int8`."""
        return "int8"

    def library_arguments(self, config: QuantizationConfig, dtype: str) -> list[str]:
        """Those of `BitsAndBytesConfig`."""
        return ["load_in_8bit=True", f"llm_int8_threshold={config.int8_threshold}"]

    def check_adapter(self, config: QuantizationConfig, lora: LoraConfig) -> None:
        """Allows what leaves the base as it is and does not read it in each step."""
        check_frozen(config, lora)
        if lora.use_dora:
            raise ConfigError(
                "lora.use_dora=true (lora=dora) reads the full weights in each step, which PEFT cannot do with 8-bit "
                "layers in training; choose quantization=nf4 or quantization=none, or train without it "
                "(lora=all-linear lora.use_dora=false)"
            )
        if lora.init.value == "loftq":
            raise loftq_needs_4_bits(config)

    def experts_unsupported_reason(self) -> str:
        """Says that its products are those of linear layers."""
        return "bitsandbytes has 8-bit products for linear layers alone"

    def fsdp_unsupported_reason(self) -> str:
        """Says where the scales are."""
        return "8-bit weights keep their scales elsewhere"

    def fast_step_unsupported_reason(self) -> str:
        """Says that only 4-bit layers are fused."""
        return "the base is not quantized to 4 bits"

    def stored_base(self, config: QuantizationConfig) -> StoredBase:
        """Counts one byte a weight and a float32 a row; the int8 product keeps its input."""
        unquantized_bytes = 4 if config.compute_dtype is ComputeDtype.fp32 else 2
        return StoredBase(lambda rows, columns: rows * columns + 4 * rows, 1.0, unquantized_bytes, keeps_input=True)

    def library_config(self, config: QuantizationConfig, placement: Placement) -> Any:
        """A `BitsAndBytesConfig`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.int8_threshold)

    def check_saved(self, config: QuantizationConfig, settings: Mapping[str, Any], key: str) -> None:
        """Compares the bits."""
        check_saved_bits(config, settings, key)

    def saved_shape(self, layer: torch.nn.Module) -> torch.Size | None:
        """The shape of the integers."""
        from qlora.upstream.torch_models import weight_of

        return weight_of(layer).shape

    def layer_classes(self) -> tuple[type[torch.nn.Module], ...]:
        """`Linear8bitLt`."""
        from bitsandbytes.nn import Linear8bitLt

        return (Linear8bitLt,)

    def quantize(self, layer: torch.nn.Module, weight: Tensor) -> Tensor:
        """Quantizes row by row."""
        from qlora.quantization.bnb8 import layers

        return layers.quantize(weight)

    def dequantize(self, layer: torch.nn.Module) -> Tensor:
        """In float32."""
        from qlora.quantization.bnb8 import layers

        return layers.dequantize(layer)

    def rounding(self, layer: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        """Rounds the weights alone."""
        from qlora.quantization.bnb8 import layers

        return layers.round_weight

    def scales(self, parameter: Tensor) -> list[Tensor] | None:
        """The scale of each row."""
        scales = getattr(parameter, "SCB", None)
        return None if scales is None else [scales]

    def exact_products(self, model: torch.nn.Module, key: str) -> AbstractContextManager[None]:
        """The first call of a layer would move its weight."""
        from qlora.quantization.bnb8 import layers

        return layers.exact_products(model, key)

    def is_statistic(self, name: str) -> bool:
        """Knows them by their names."""
        return name.endswith((".SCB", ".weight_format"))

    def read_saved(self, tensors: SavedTensors, name: str, device: torch.device) -> Tensor | None:
        """Decodes a weight with the scales beside it."""
        from qlora.quantization.bnb8 import layers

        return layers.read_saved(tensors, name, device)
