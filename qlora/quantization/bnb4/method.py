"""4 bits a weight by bitsandbytes: NF4 or FP4, with or without double quantization (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora.config.schema import ComputeDtype, LoraConfig, QuantizationConfig, QuantType
from qlora.quantization.bnb4.layout import stored_base
from qlora.quantization.method import QuantizationMethod, SavedTensors, quantizes_experts
from qlora.quantization.rules import check_frozen, check_saved_bits
from qlora.quantization.stored_base import StoredBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora.quantization.bnb4.quantized_weight import QuantizedWeight
    from qlora.runtime.device import Placement

LARGEST_ERROR = {QuantType.nf4: 0.12, QuantType.fp4: 0.16}
"""Relative, of normally distributed weights: about 0.096 for NF4 and 0.123 for FP4; more is a broken library."""
STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""What bitsandbytes saves beside a weight, and `.quant_state.*`."""


class Bnb4(QuantizationMethod):
    """Linear layers of bitsandbytes' `Linear4bit`."""

    name = "bnb4"
    package = "bitsandbytes"
    library_class = "BitsAndBytesConfig"
    offloads_experts = True
    decodes = ("mxfp4",)
    quantizing_operators = ("bitsandbytes::quantize_4bit",)

    def describe(self, config: QuantizationConfig) -> str:
        """As `nf4 + double quantization`."""
        return f"{config.quant_type.value}" + (" + double quantization" if config.double_quant else "")

    def describe_precision(self, config: QuantizationConfig) -> str:
        """As `4-bit NF4 with double quantization`."""
        double = " with double quantization" if config.double_quant else ""
        return f"4-bit {config.quant_type.value.upper()}{double}"

    def data_type(self, config: QuantizationConfig) -> str:
        """As `nf4`."""
        return config.quant_type.value

    def library_arguments(self, config: QuantizationConfig, dtype: str) -> list[str]:
        """Those of `BitsAndBytesConfig`."""
        return [
            "load_in_4bit=True",
            f'bnb_4bit_quant_type="{config.quant_type.value}"',
            f"bnb_4bit_use_double_quant={config.double_quant}",
            f"bnb_4bit_compute_dtype={dtype}",
        ]

    def check_adapter(self, config: QuantizationConfig, lora: LoraConfig) -> None:
        """Allows what leaves the base as it is."""
        check_frozen(config, lora)

    def fsdp_unsupported_reason(self) -> None:
        """Returns None: the packed bytes are sharded as floats."""

    def fast_step_unsupported_reason(self) -> None:
        """Returns None: the kernels in this package decode the weights."""

    def experts_unsupported_reason(self) -> None:
        """Returns None: each matrix of an expert is quantized as a linear layer would be."""

    def stored_base(self, config: QuantizationConfig) -> StoredBase:
        """Counts half a byte a weight, absmax values and codebooks."""
        unquantized_bytes = 4 if config.compute_dtype is ComputeDtype.fp32 else 2
        return stored_base(
            double_quant=config.double_quant,
            unquantized_bytes=unquantized_bytes,
            experts=quantizes_experts(self, config),
        )

    def largest_error(self, config: QuantizationConfig) -> float:
        """The limit for the data type."""
        return LARGEST_ERROR[config.quant_type]

    def library_config(self, config: QuantizationConfig, placement: Placement) -> Any:
        """A `BitsAndBytesConfig`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant_type.value,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=placement.compute_dtype,
        )

    @contextmanager
    def loading(self, config: QuantizationConfig, saved: str | None = None) -> Iterator[None]:
        """Quantizes each expert as soon as it is read."""
        from qlora.quantization.bnb4.loading import ExpertsIn4Bits
        from qlora.upstream.transformers_quantizer import quantizing_experts

        quantizes = quantizes_experts(self, config)
        kind, is_decoded = config.quant_type.value, saved in self.decodes
        with quantizing_experts(ExpertsIn4Bits(kind, config.double_quant, quantizes, is_decoded)):
            yield

    def check_saved(self, config: QuantizationConfig, settings: Mapping[str, Any], key: str) -> None:
        """Compares the bits, the data type and double quantization."""
        check_saved_bits(config, settings, key)

    def set_decoded_dtype(self, parameter: Tensor, dtype: torch.dtype) -> bool:
        """The dtype stands in the weight's quantization state; experts are decoded to any."""
        from qlora.experts.layout import Placeholder

        if isinstance(parameter, Placeholder):
            parameter.data = parameter.to(dtype).data
            return True
        from qlora.quantization.bnb4 import layers

        return layers.set_decoded_dtype(parameter, dtype)

    def missing_statistics(self, model: torch.nn.Module) -> list[str]:
        """Those of double-quantized absmax values."""
        from qlora.quantization.bnb4 import layers

        return layers.missing_statistics(model)

    def saved_shape(self, layer: torch.nn.Module) -> torch.Size | None:
        """The shape in the weight's quantization state."""
        state = getattr(layer.weight, "quant_state", None)
        return state.shape if state else None

    def prepare(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """A saved checkpoint would compute in the precision it was saved in, and a CPU may repack its weights."""
        from qlora.quantization.bnb4 import layers
        from qlora.upstream import bitsandbytes

        bitsandbytes.disable_repacking(model)
        layers.set_compute_dtype(model, dtype)

    def layer_classes(self) -> tuple[type[torch.nn.Module], ...]:
        """`Linear4bit`."""
        from bitsandbytes.nn import Linear4bit

        return (Linear4bit,)

    def quantize(self, layer: torch.nn.Module, weight: Tensor) -> Tensor:
        """Quantizes on the weight's device."""
        from qlora.quantization.bnb4 import layers

        return layers.quantize(layer, weight)

    def quantize_experts(self, experts: torch.nn.Module, config: QuantizationConfig) -> None:
        """One expert after the other."""
        from qlora.experts.layout import ExpertsLayout, is_stored
        from qlora.quantization.bnb4.experts import quantize_parameter

        for projection in ExpertsLayout.of(experts).projections:
            if not is_stored(experts, projection):
                weight: Tensor = getattr(experts, projection)
                kind = config.quant_type.value
                quantize_parameter(experts, projection, weight.detach(), kind, double_quant=config.double_quant)

    def dequantize(self, layer: torch.nn.Module) -> Tensor:
        """In the dtype that the layer computes with."""
        from qlora.quantization.bnb4 import layers

        return layers.dequantize(layer)

    def rounding(self, layer: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        """Quantizes and dequantizes as the layer was, to the bit."""
        from qlora.quantization.bnb4 import layers

        return layers.Rounding.of(layer)

    def scales(self, parameter: Tensor) -> list[Tensor] | None:
        """The absmax values; of double-quantized ones what decodes them."""
        from qlora.quantization.bnb4 import layers

        return layers.scales(parameter)

    def count(self, parameter: Tensor) -> tuple[int, str]:
        """Counts two weights a byte, and experts by the placeholder in their stead."""
        from qlora.experts.layout import Placeholder

        if isinstance(parameter, Placeholder):
            return parameter.numel(), parameter.data_type
        if (state := getattr(parameter, "quant_state", None)) is not None:
            return state.shape.numel(), state.quant_type
        return super().count(parameter)

    def packed_weight(self, layer: torch.nn.Module) -> QuantizedWeight | None:
        """The tensors of a layer in bitsandbytes' usual layout."""
        from qlora.quantization.bnb4.quantized_weight import read_quantized_weight
        from qlora.upstream.torch_models import weight_of

        return read_quantized_weight(weight_of(layer))

    def is_statistic(self, name: str) -> bool:
        """Knows them by their endings."""
        head, separator, tail = name.partition(".weight.")
        return bool(head and separator) and (f".{tail}" in STATISTICS or tail.startswith("quant_state."))

    def read_saved(self, tensors: SavedTensors, name: str, device: torch.device) -> Tensor | None:
        """Decodes a weight with the statistics beside it."""
        from qlora.quantization.bnb4 import layers

        return layers.read_saved(tensors, name, device)
