"""Rules that several quantization methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora.config.schema import LoraConfig, LoraInit, QuantizationConfig
from qlora.errors import ConfigError


def check_saved_bits(config: QuantizationConfig, settings: Mapping[str, Any], key: str) -> None:
    """Raises `ConfigError` unless a base that bitsandbytes quantized has the bits and the data type of the config."""
    bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None
    if bits is None:
        method = settings.get("quant_method", "an unknown method")
        method = getattr(method, "value", method)
        if method == "mxfp4":
            raise ConfigError(
                f"{key} is quantized by mxfp4, which quantization.bits={config.bits} does not decode; use "
                "quantization=nf4 or quantization=none"
            )
        raise ConfigError(
            f"{key} is quantized by {method}, which is not decoded here (as bitsandbytes, mxfp4, fp8, "
            "compressed-tensors, gptq, awq, hqq and torchao are). Use the original 16-bit weights"
        )
    requested = (config.bits, config.quant_type.value, config.double_quant)
    saved = (
        bits,
        settings.get("bnb_4bit_quant_type", "nf4"),
        bool(settings.get("bnb_4bit_use_double_quant")),
    )
    if requested[0] != bits or (bits == 4 and requested != saved):
        raise ConfigError(
            f"{key} is stored in {_describe(*saved)}, but the config asks for {_describe(*requested)}; "
            f"set quantization.bits={saved[0]}" + (f" quantization.quant_type={saved[1]} quantization.double_quant="
            f"{str(saved[2]).lower()}" if bits == 4 else "") + ", or use the original 16-bit weights"
        )  # fmt: skip


def _describe(bits: int, quant_type: str, double_quant: bool) -> str:
    return f"{bits} bits" + (f" ({quant_type}{', double-quantized' if double_quant else ''})" if bits == 4 else "")


def check_frozen(config: QuantizationConfig, lora: LoraConfig) -> None:
    """Raises `ConfigError` for a kind of training that changes the weights of a quantized base."""
    bits = config.bits
    if not lora.enabled:
        raise ConfigError(
            f"lora=none trains all weights, which {bits}-bit weights do not allow; choose quantization=none "
            "(16 bit) or quantization=fp32, or an adapter with lora=all-linear"
        )
    if lora.init in (LoraInit.pissa, LoraInit.olora):
        raise ConfigError(
            f"lora.init={lora.init.value} rewrites the base weights, which quantization.bits={bits} does not allow "
            "exactly; it is valid with quantization=none or quantization=fp32. With 4 bits use lora.init=loftq or eva"
        )


def loftq_needs_4_bits(config: QuantizationConfig) -> ConfigError:
    """Returns the error for LoftQ on a base of other bits."""
    return ConfigError(
        f"lora.init=loftq corrects the error of 4-bit weights, got quantization.bits={config.bits}; choose "
        "quantization=nf4, or another lora.init"
    )
