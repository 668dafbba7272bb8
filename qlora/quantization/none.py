"""A base that is not quantized: 16 or 32 bits a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora.config.schema import ComputeDtype, LoraConfig, LoraInit, QuantizationConfig
from qlora.quantization.method import QuantizationMethod
from qlora.quantization.rules import check_saved_bits, loftq_needs_4_bits
from qlora.quantization.stored_base import StoredBase


class Unquantized(QuantizationMethod):
    """All weights in one floating-point type."""

    name = "none"
    is_quantized = False
    decodes = ("mxfp4",)

    def describe(self, config: QuantizationConfig) -> str:
        """As `16 bit`."""
        return f"{config.bits} bit"

    def describe_precision(self, config: QuantizationConfig) -> str:
        """As `16 bits`."""
        return f"{config.bits} bits"

    def data_type(self, config: QuantizationConfig) -> str:
        """As `16 bits`."""
        return f"{config.bits} bits"

    def check_adapter(self, config: QuantizationConfig, lora: LoraConfig) -> None:
        """Allows everything but LoftQ, which needs a rounding error to correct."""
        if lora.enabled and lora.init is LoraInit.loftq:
            raise loftq_needs_4_bits(config)

    def fsdp_unsupported_reason(self) -> None:
        """Returns None."""

    def fast_step_unsupported_reason(self) -> str:
        """Says that only 4-bit layers are fused."""
        return "the base is not quantized to 4 bits"

    def stored_base(self, config: QuantizationConfig) -> StoredBase:
        """Counts 2 or 4 bytes a weight."""
        size = 4 if self.stores_fp32(config) or config.compute_dtype is ComputeDtype.fp32 else 2
        return StoredBase(lambda rows, columns: rows * columns * size, size, size, is_quantized=False)

    def stores_fp32(self, config: QuantizationConfig) -> bool:
        """Returns whether the weights have 32 bits."""
        return config.bits == 32

    def prefers_bf16(self, config: QuantizationConfig) -> bool:
        """Returns whether the weights have 16 bits, which are those of the compute dtype."""
        return config.bits == 16

    def check_saved(self, config: QuantizationConfig, settings: Mapping[str, Any], key: str) -> None:
        """Refuses every quantized base."""
        check_saved_bits(config, settings, key)
